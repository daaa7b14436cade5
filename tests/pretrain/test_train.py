"""Trainings from end to end, one process in this one (gloo) unless said otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.pretrain.tiny import CASES, DIE_AT, changed, config, make_pool
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.params import ParameterError
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job
from winnow.pretrain.stage import PretrainStage, TrainRun

THIS = "tests.pretrain.tiny"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


def run(pool: str, out: Path | str, config: PretrainConfig, key: str = "key") -> dict[str, torch.Tensor]:
    launch([Job(config, pool, None, str(out), seed=0, key=key)], via="local")
    return load_file(f"{out}/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding. The bias of the keys has no gradient (softmax ignores it), so Adam moves it by noise."""
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        got = weights[name].reshape(value.shape)
        if name.endswith("in_proj_bias"):
            got, value = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (got, value))
        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4)


def norms(out: Path) -> list[float]:
    """Adam hides the size of gradients; the log tells it."""
    return [line["grad_norm"] for line in lines(out) if "grad_norm" in line]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of 6 steps."""
    out = tmp_path_factory.mktemp("whole")
    run(pool, out, config(log_every=1))
    return out


def test_it_learns_and_logs_each_step(whole: Path) -> None:
    steps = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in steps] == [8, 16, 24, 32, 40, 48]
    # The first loss is near that of knowing nothing, ln 8.
    assert steps[0]["loss"] == pytest.approx(np.log(8), abs=0.5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["lr"] for line in steps][:3] == pytest.approx([0.005, 0.01, 0.01])
    assert all(line["grad_norm"] > 0 and line["logit_scale"] > 1 for line in steps)


def test_one_weights_file_serves_open_clip_and_winnow(whole: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{whole}")
    model.eval()
    encoder = load_encoder(str(whole), device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    texts = ["a red image", "nothing"]
    with torch.no_grad():
        images, captions, scale = model(preprocess(image)[None], open_clip.get_tokenizer(f"local-dir:{whole}")(texts))
    logits = (
        encoder.logit_scale * encoder.encode_images(encoder.preprocess(image)[None]) @ encoder.encode_texts(texts).T
    )
    np.testing.assert_allclose(logits, (scale * images @ captions.T).numpy(), rtol=1e-5)
    trained = json.loads((whole / "config.json").read_text())["training"]
    assert (trained["steps"], trained["samples_seen"], trained["seed"]) == (6, 48, 0)


def test_weights_are_those_of_a_plain_training_loop(pool: str, whole: Path) -> None:
    """The same batches through open_clip's own loss and AdamW, without DeepSpeed."""
    from winnow.pretrain.data.loader import Batches
    from winnow.pretrain.data.samples import Samples
    from winnow.pretrain.loop import make_objective

    c = config()
    objective = make_objective(c, seed=0)
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in objective.parameters():
        groups[parameter.ndim >= 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.2}, {"params": groups[False], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    loss_of = open_clip.ClipLoss()
    with Batches(Samples(pool, None), objective.views, seed=0, batch=8, last=6) as batches:
        for step, batch in enumerate(batches):
            cosine = 0.5 * (1 + np.cos(np.pi * (step - 2) / 4)) * 1e-2
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (step + 1) / 2 if step < 2 else cosine
            image = (torch.from_numpy(batch["image"]) / 255 - objective.mean) / objective.std
            optimizer.zero_grad()
            loss_of(*objective.net(image, torch.from_numpy(batch["text"]))).backward()
            optimizer.step()
    close(objective.net.state_dict(), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize("damage", ["none", "last", "all"])
def test_interrupted_and_resumed_ends_in_the_same_bits(
    damage: str, pool: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(objective=f"{THIS}:Dying", save_every=2, log_every=1)
    monkeypatch.setenv(DIE_AT, "5")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path, c)
    assert not (tmp_path / "model.safetensors").exists()
    saved = sorted(path for path in (tmp_path / "resume").iterdir() if path.is_dir())
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    for path in {"none": [], "last": saved[-1:], "all": saved}[damage]:
        file = next(path.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setenv(DIE_AT, "0")
    weights = run(pool, tmp_path, c)
    assert same(weights, load_file(whole / "model.safetensors"))
    events = [line for line in lines(tmp_path) if "event" in line]
    start = {"none": 4, "last": 2, "all": 0}[damage]
    assert [line["step"] for line in events if line["event"] == "start"][-1] == start
    passed_over = [line["what"] for line in events if line["event"] == "checkpoint passed over"]
    assert len(passed_over) == {"none": 0, "last": 1, "all": 2}[damage]
    assert all("damaged" in what for what in passed_over)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_another_content_key_does_not_resume(pool: str, tmp_path: Path) -> None:
    first = run(pool, tmp_path, config(), key="a")
    other = run(pool, tmp_path, config(lr=1e-3), key="b")
    assert not same(first, other)
    assert [line["step"] for line in lines(tmp_path) if line.get("event") == "start"] == [0]


def test_checkpoints_of_a_finished_training_export_again(pool: str, tmp_path: Path) -> None:
    c = config(save_every=2, keep=1)
    weights = run(pool, tmp_path, c)
    content = (tmp_path / "config.json").read_bytes()
    assert [path.name for path in (tmp_path / "resume").iterdir() if path.is_dir()] == ["step-00000006"]
    (tmp_path / "model.safetensors").unlink()
    assert same(run(pool, tmp_path, c), weights)
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_the_same_and_resumes(
    stage: int, pool: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(objective=f"{THIS}:Dying", zero_stage=stage, save_every=4, log_every=1)
    monkeypatch.setenv(DIE_AT, "5")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path, c)
    monkeypatch.setenv(DIE_AT, "0")
    close(run(pool, tmp_path, c), load_file(whole / "model.safetensors"))
    assert norms(tmp_path) == pytest.approx(norms(whole), rel=1e-3)


def test_zero_keeps_the_logit_scale_within_bounds(pool: str, tmp_path: Path) -> None:
    """ZeRO steps copies of the parameters, which must learn of the clamp; the scale starts at 14.3."""
    c = config(objective={"clip": {"logit_scale_max": 14.0}}, zero_stage=2, log_every=1)
    weights = run(pool, tmp_path, c)
    assert float(weights["logit_scale"]) <= np.log(14.0) + 1e-6
    moved = [line["logit_scale"] for line in lines(tmp_path) if "logit_scale" in line]
    assert max(moved) <= 14.0001


def test_bf16_trains_close_to_fp32(pool: str, whole: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, config(precision="bf16", log_every=1))
    loss, expected = ([line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path, whole))
    assert loss != expected
    assert loss == pytest.approx(expected, abs=0.05)


def test_an_objective_of_ones_own_in_parts(pool: str, tmp_path: Path) -> None:
    """A loss that does not couple the batch is the same cut in four; one that does is never cut."""
    local = config(objective=f"{THIS}:Brightness", weight_decay=0.0)
    one = run(pool, tmp_path / "one", local)
    four = run(pool, tmp_path / "four", changed(local, accumulation_steps=4))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ParameterError, match="couples the samples"):
        config(accumulation_steps=4)


def test_two_local_processes_train_as_one(pool: str, whole: Path, tmp_path: Path) -> None:
    close(run(pool, tmp_path, config(num_processes=2, log_every=1)), load_file(whole / "model.safetensors"))
    assert norms(tmp_path) == pytest.approx(norms(whole), rel=1e-3)


def test_a_failing_process_says_why(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="holds no finished pool"):
        run(str(tmp_path / "nowhere"), tmp_path, config())


@pytest.mark.parametrize("runs_per_launch", [1, 2])
def test_the_stage_trains_each_run_once(runs_per_launch: int, pool: str, whole: Path, tmp_path: Path) -> None:
    digest = Pool.open(pool).digest
    runs = tuple(TrainRun("none", seed, pool, None, digest) for seed in (0, 1))
    stage = PretrainStage(config(runs_per_launch=runs_per_launch), runs, str(tmp_path / "out"))
    manifest = execute(stage, SerialExecutor())
    assert manifest.items == 96
    out = tmp_path / "out" / "none" / "seed-0"
    assert same(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert not same(load_file(out / "model.safetensors"), load_file(out.parent / "seed-1" / "model.safetensors"))

    shutil.rmtree(out / "resume")  # a finished unit needs none
    again = execute(PretrainStage(config(threads=2), runs[:1], str(tmp_path / "out")), SerialExecutor())
    assert not (out / "resume").exists()
    assert again.files == {path: facts for path, facts in manifest.files.items() if "seed-0" in path}


def test_it_resumes_and_loads_from_an_object_store(
    pool: str, whole: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    out = f"memory://{request.node.name}"
    c = config(objective=f"{THIS}:Dying", save_every=2)
    job = Job(c, pool, None, out, seed=0, key="key")
    monkeypatch.setenv(DIE_AT, "5")
    with pytest.raises(KeyboardInterrupt):
        launch([job], via="local")
    monkeypatch.setenv(DIE_AT, "0")
    launch([job], via="local")
    assert storage.read_bytes(f"{out}/model.safetensors") == (whole / "model.safetensors").read_bytes()
    log = [json.loads(line) for line in storage.read_bytes(f"{out}/log.jsonl").decode().splitlines()]
    assert [line["step"] for line in log if line.get("event") == "start"] == [0, 4]
    x = np.ones((1, 3, 32, 32), np.float32)
    ours, expected = (load_encoder(spec, device="cpu").encode_images(x) for spec in (out, str(whole)))
    np.testing.assert_array_equal(ours, expected)


def test_another_training_leaves_nothing_of_the_one_before(pool: str, tmp_path: Path) -> None:
    """Their files would be in one folder, and a folder with open_clip's config is taken for a model of open_clip."""
    for name in ("clip", "simclr"):
        run(pool, tmp_path / "out", config(**CASES[name]), key=name)
        assert (tmp_path / "out" / "open_clip_config.json").exists() == (name == "clip")
    assert load_encoder(str(tmp_path / "out"), device="cpu").has_text is False


@pytest.mark.parametrize("seed", [2**31 - 1, 2**40])
def test_any_seed_will_do(seed: int, pool: str, tmp_path: Path) -> None:
    job = Job(config(**CASES["simclr"]), pool, None, str(tmp_path), seed=seed, key="key")
    launch([job])
    assert (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_no_checkpoint(pool: str, tmp_path: Path) -> None:
    """The last update is followed by no loss that would show it."""
    with pytest.raises(WinnowError, match="weights that are not finite"):
        run(pool, tmp_path, config(lr=1e38, warmup_steps=0, samples_seen=8, log_every=100))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"), [({"batch_size": 1}, "batch_size 1 has no others"), ({"lr": float("inf")}, "finite number")]
)
def test_settings_that_teach_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        config(**settings)
