"""What every registered objective must do."""

from pathlib import Path

import numpy as np
import pytest

from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import CASES, MODEL, changed, config, make_pool
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job
from winnow.pretrain.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def wholes(pool: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Directories of uninterrupted trainings of 6 steps, by objective."""
    done: dict[str, Path] = {}

    def whole(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            run(pool, done[name], config(**CASES[name], log_every=1))
        return done[name]

    return whole


def test_each_has_its_case() -> None:
    assert sorted(CASES) == OBJECTIVES.names()


@pytest.mark.parametrize("name", CASES)
def test_its_checkpoint_is_an_encoder(name: str, wholes) -> None:  # type: ignore[no-untyped-def]
    """Rebuilt from the folder alone, and gives a unit vector an image."""
    whole = wholes(name)
    encoder = load_encoder(str(whole), device="cpu")
    assert (whole / "open_clip_config.json").exists() == encoder.has_text
    side = encoder.image_size
    features = encoder.encode_images(np.random.default_rng(0).random((3, 3, side, side), np.float32))
    assert features.shape == (3, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if OBJECTIVES.load(name).cacheable])
def test_a_batch_cut_by_grad_cache_trains_as_a_whole(name: str, pool: str, tmp_path: Path) -> None:
    c = config(**CASES[name] | {"model": MODEL}, log_every=1, samples_seen=24)
    for parts in (1, 4):
        run(pool, tmp_path / str(parts), changed(c, grad_cache=parts))
    whole, cut = (
        [(line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(parts)) if "loss" in line]
        for parts in (1, 4)
    )
    np.testing.assert_allclose(cut, whole, rtol=1e-3)


def test_two_processes_train_as_one(pool: str, wholes, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The losses of six steps. AdamW magnifies the noise of gradients near zero, so weights are compared elsewhere."""
    configs = {name: config(**case, num_processes=2, log_every=1) for name, case in CASES.items()}
    # One start of the processes does them all.
    launch([Job(c, pool, None, str(tmp_path / name), seed=0, key="key") for name, c in configs.items()], via="local")
    for name in CASES:
        ours, reference = (
            [line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path / name, wholes(name))
        )
        assert ours == pytest.approx(reference, rel=1e-3), name
