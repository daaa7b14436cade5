import math
import pickle
import subprocess
import sys
from typing import Any

import pytest

from tests.pretrain.tiny import CASES, MODEL, changed, config
from winnow.infra.io.storage import digest_json
from winnow.infra.params import ParameterError, build
from winnow.pretrain.config import SCALES, PretrainConfig
from winnow.pretrain.models.open_clip import find_tag, model_config, pretrained_tags
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.objectives.contrastive import simclr

# Of `identity()` at commit 2a7dc78, before the config had sections: the content keys of finished trainings.
IDENTITIES = {
    "autoencoder": "44a76cc2afb9c8bef143c0b0431f86225735f39772b74d5fbbd3b2bdc50c057d",
    "clip": "7f39f02979b0c9a9bd673c1a1638b33a81fab4aee13beeb835f79b3dc457b7f7",
    "diffusion": "86502f4cfc2a0b432c94b61862cc5cc6c0f24850cf52df657f60e39abe8821f0",
    "moco": "3f416126d800d524c3281583ea2b710ee9c283eb7b48bcb098874532c8d9390d",
    "siglip": "ddfc66627b35d1237e3a2f5a77e7b44605cc7b87a99e379169f469ad0defeee5",
    "simclr": "5b64e5106292adf3430e9ede4581c23a17969b78d2ddf25cfdb0814d6c1db665",
}


def given(**values: Any) -> PretrainConfig:
    return build(PretrainConfig, values, "")


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
    c = given(scale=scale)
    assert c.model.name == model
    assert (c.batch_size, c.lr, c.warmup_steps, c.samples_seen, c.optimizer.beta2) == (batch, lr, warmup, seen, beta2)
    assert c.steps == math.ceil(seen / batch)
    # What its train.py leaves to open_clip: get_default_params of a ViT, --wd, --lr-scheduler; and no clipping.
    optimizer = c.optimizer
    assert (optimizer.name, optimizer.beta1, optimizer.eps, optimizer.weight_decay) == ("adamw", 0.9, 1e-6, 0.2)
    assert (c.schedule, optimizer.grad_clip, optimizer.ema, c.parallel.accumulation_steps) == ("cosine", None, None, 1)


def test_given_values_override_the_scales() -> None:
    c = given(scale="small", samples_seen=4096 * 1000, model=MODEL)
    assert c.steps == 1000
    assert c.lr == SCALES["small"]["lr"]
    assert c.model.resolved() == MODEL
    optimizer = given(scale="xlarge", optimizer={"grad_clip": 1.0}).optimizer
    assert (optimizer.beta2, optimizer.grad_clip) == (0.95, 1.0)


@pytest.mark.parametrize(
    ("changes", "words", "path"),
    [
        ({"model": "ViT-B-23"}, 'Did you mean "ViT-B-32"', ("model",)),
        ({"model": {"config": {"embed_dim": 4}}}, "vision_cfg, text_cfg missing", ("model",)),
        ({"objective": "clipp"}, 'Did you mean "clip"', ("objective",)),
        (
            {"objective": {"clip": {"logit_scale_mx": 3}}},
            'Did you mean "logit_scale_max"',
            ("objective", "clip", "logit_scale_mx"),
        ),
        (
            {"objective": {"simclr": {"dim": "big"}}},
            "must be a whole number, not 'big'",
            ("objective", "simclr", "dim"),
        ),
        ({"objective": {"moco": {"queue": 3.5}}}, "must be a whole number, not 3.5", ("objective", "moco", "queue")),
        ({"objective": {"moco": {"queue": 0}}}, "must be at least 1, not 0", ("objective", "moco", "queue")),
        ({"objective": {"moco": {}, "clip": {}}}, "name one objective", ("objective",)),
        ({"learning_rate": 1}, "learning_rate", ("learning_rate",)),
        ({"batch_size": 9, "num_processes": 2}, "cannot be divided evenly among 2 processes", ("batch_size",)),
        ({"batch_size": "8"}, "must be a whole number", ("batch_size",)),
        ({"lr": "5e-4"}, "must be a number, not '5e-4'", ("lr",)),
        ({"warmup_steps": 6}, "warmup_steps is 6, the training has 6 steps", ("warmup_steps",)),
        ({"augment": (0.0, 1.0)}, "fraction of the image's area", ("augment",)),
        ({"seeds": 3}, r"must be a list, not 3 (write [3])", ("seeds",)),
        ({"init": "nowhere"}, "no such checkpoint folder", ("init",)),
        ({"workers": 2}, "`workers` is now `parallel.num_processes`", ("workers",)),
        ({"warmup": 2}, "`warmup` is now `warmup_steps`", ("warmup",)),
        ({"optimizer": "lars"}, "`optimizer: lars` is now `optimizer: {name: lars}`", ("optimizer",)),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes: dict, words: str, path: tuple) -> None:
    values = {"model": MODEL, "samples_seen": 48, "batch_size": 8, "warmup_steps": 2}
    if "num_processes" in changes:
        changes["parallel"] = {"num_processes": changes.pop("num_processes")}
    with pytest.raises(ParameterError) as error:
        given(**values | changes).check()
    assert words in str(error.value)
    assert error.value.path == path


@pytest.mark.parametrize(
    "key",
    [
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "momentum",
        "grad_clip",
        "ema",
        "workers",
        "decoders",
        "threads",
        "device",
        "zero_stage",
        "offload",
        "activation_checkpointing",
        "accumulate",
        "grad_cache",
        "runs_per_start",
        "max_failures",
        "deepspeed",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "wandb",
    ],
)
def test_a_key_of_before_is_refused_with_its_new_name(key: str) -> None:
    with pytest.raises(ParameterError, match=f"`{key}` is now `") as error:
        given(model=MODEL, samples_seen=48, batch_size=8, warmup_steps=2, **{key: 1})
    section, _, name = error.value.what.split("`")[3].partition(".")
    assert name in PretrainConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(IDENTITIES))
def test_identity_is_that_of_finished_trainings(name: str) -> None:
    assert digest_json(config(**CASES[name]).identity()) == IDENTITIES[name]


def test_identity_of_scales_and_settings_is_that_of_finished_trainings() -> None:
    for scale, digest in (
        ("small", "0d8102d5c627a4c43b418b889bfa91e3a6a43b5c4eb40a3b8404fbede89cd2ef"),
        ("xlarge", "e5dc3f9e5ed6d2a4bcb7cde5fcef7b51e1b53a11cb4338cac5d1b7a3f6eaf6c2"),
    ):
        assert digest_json(given(scale=scale).identity()) == digest
    optimizer = {"name": "lars", "ema": 0.5, "grad_clip": 1, "weight_decay": 1, "momentum": 0.5}
    c = config(
        optimizer=optimizer | {"beta1": 0.5, "beta2": 0.6, "eps": 1e-3},
        augment=(0.5, 1),
        precision="bf16",
        deepspeed={"gradient_clipping": 1.0},
        objective={"clip": {"logit_scale_max": 50}},
        schedule="const",
    )
    assert digest_json(c.identity()) == "86637852840e2ebb91e670e7e6406ca72cdb5f85fe81ce572e55ab318f59a215"


def test_identity_holds_what_decides_the_weights() -> None:
    base = config().identity()
    same = config(num_processes=2, threads=3, save_every=1, zero_stage=2, device="auto", seeds=[4, 5])
    assert same.identity() == base
    assert config(lr=2e-2).identity() != base
    assert config(init="ViT-B-32:random").identity() != base
    small = given(scale="small")
    spelt = given(model=model_config("ViT-B-32"), **{k: v for k, v in SCALES["small"].items() if k != "model"})
    assert small.identity() == spelt.identity()


def test_the_objective_is_loaded_once_and_its_config_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a config is asked; another process, which gets it pickled, does so once more."""
    loads, builds = [], []
    load, build_params = OBJECTIVES.load, simclr.Config.__init__
    monkeypatch.setattr(OBJECTIVES, "load", lambda name: loads.append(name) or load(name))
    monkeypatch.setattr(simclr.Config, "__init__", lambda self, **v: builds.append(1) or build_params(self, **v))
    c = changed(config(), **CASES["simclr"])
    loads.clear(), builds.clear()
    c = changed(c, lr=1e-3)
    for _ in range(3):
        c.check(), c.identity(), c.absolute().params, c.reads_text
    assert (len(loads), len(builds)) == (1, 1)
    travelled = pickle.loads(pickle.dumps(c))
    assert travelled == c and travelled.params == c.params
    assert (len(loads), len(builds)) == (2, 2)


def test_each_published_tag_is_found() -> None:
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "RN50"):
        assert pretrained_tags(name)
        for tag in pretrained_tags(name):
            assert find_tag(name, tag.upper().replace("_", "-")) == tag


def test_configs_and_stages_import_no_torch() -> None:
    """Until the config is checked against the objective's class."""
    code = (
        "import sys, winnow.pretrain.encoder, winnow.pretrain.stage, winnow.pretrain.launch\n"
        "from winnow.pretrain.config import PretrainConfig\n"
        "PretrainConfig(scale='small', objective={'clip': {'logit_scale_max': 50.0}})\n"
        "winnow.pretrain.encoder.encoder_digest('pixels:8')\n"
        "print([m for m in ('torch', 'ray', 'open_clip', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
