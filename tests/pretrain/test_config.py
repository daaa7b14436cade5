import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.pretrain.tiny import MODEL, config
from winnow.pretrain.config import SCALES, PretrainConfig
from winnow.pretrain.models.catalog import find_tag, model_config, model_names, pretrained_tags


@pytest.mark.parametrize(
    ("scale", "model", "batch", "lr", "warmup", "seen", "beta2"),
    [  # DataComp's scale_configs.py, copied by hand
        ("small", "ViT-B-32", 4096, 5e-4, 500, 12_800_000, 0.98),
        ("medium", "ViT-B-32", 4096, 5e-4, 500, 128_000_000, 0.98),
        ("large", "ViT-B-16", 8192, 5e-4, 500, 1_280_000_000, 0.98),
        ("xlarge", "ViT-L-14", 90112, 1e-3, 10_000, 12_800_000_000, 0.95),
    ],
)
def test_scales_are_datacomps(
    scale: str, model: str, batch: int, lr: float, warmup: int, seen: int, beta2: float
) -> None:
    c = PretrainConfig(scale=scale)
    assert c.model.name == model
    assert (c.batch_size, c.lr, c.warmup, c.samples_seen, c.beta2) == (batch, lr, warmup, seen, beta2)
    assert c.steps == math.ceil(seen / batch)
    # What its train.py leaves to open_clip: get_default_params of a ViT, --wd, --lr-scheduler; and no clipping.
    assert (c.optimizer, c.beta1, c.eps, c.weight_decay, c.schedule) == ("adamw", 0.9, 1e-6, 0.2, "cosine")
    assert (c.grad_clip, c.ema, c.accumulate) == (None, None, 1)


def test_given_values_stand_over_the_scales() -> None:
    c = PretrainConfig(scale="small", samples_seen=4096 * 1000, model=MODEL)
    assert c.steps == 1000
    assert c.lr == SCALES["small"]["lr"]
    assert c.model.resolved() == MODEL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "ViT-B-23"}, 'Did you mean "ViT-B-32"'),
        ({"model": {"config": {"embed_dim": 4}}}, "vision_cfg, text_cfg missing"),
        ({"objective": "clipp"}, 'Did you mean "clip"'),
        ({"objective": {"clip": {"logit_scale_mx": 3}}}, 'Did you mean "logit_scale_max"'),
        ({"learning_rate": 1}, "learning_rate"),
        ({"batch_size": 9, "workers": 2}, "cannot be shared evenly by 2 workers"),
        ({"warmup": 6}, "warmup is 6 steps, the training has 6"),
        ({"augment": (0.0, 1.0)}, "share of the image's area"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("(", r"\(")):
        config(**changes)


def test_identity_holds_what_decides_the_weights() -> None:
    base = config().identity()
    assert config(workers=2, threads=3, save_every=1, zero_stage=2, device="auto").identity() == base
    assert config(lr=2e-2).identity() != base
    small = PretrainConfig(scale="small")
    spelt = PretrainConfig(model=model_config("ViT-B-32"), **{k: v for k, v in SCALES["small"].items() if k != "model"})
    assert small.identity() == spelt.identity()


def test_tables_read_from_source_are_open_clips() -> None:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    shipped = Path(open_clip.__file__).parent / "model_configs"
    names = [name for name in open_clip.list_models() if (shipped / f"{name}.json").exists()]
    assert len(names) > 100 and set(model_names()) >= set(names)
    for name in names:
        tags = open_clip.list_pretrained_tags_by_model(name)
        assert sorted(pretrained_tags(name)) == sorted(tags), name
        for tag in tags:
            assert find_tag(name, tag) == tag
            assert pretrained_tags(name)[tag] == bool(get_pretrained_cfg(name, tag).get("quick_gelu")), (name, tag)


def test_configs_and_stages_import_no_torch() -> None:
    code = (
        "import sys, winnow.pretrain.encoder, winnow.pretrain.stage, winnow.pretrain.launch\n"
        "from winnow.pretrain.config import PretrainConfig\n"
        "PretrainConfig(scale='small', objective={'clip': {'logit_scale_max': 50.0}})\n"
        "winnow.pretrain.encoder.encoder_digest('ViT-B-32:openai')\n"
        "print([m for m in ('torch', 'ray', 'open_clip', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
