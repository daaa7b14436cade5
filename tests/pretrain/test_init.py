"""`init:`, which starts a training from another encoder's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain.test_train import run
from tests.pretrain.tiny import CASES, MODEL, NARROW, config, make_pool
from winnow.infra.errors import UsageError
from winnow.pretrain.loop import make_objective
from winnow.pretrain.models.open_clip import build_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of CLIP, SimCLR on timm's network, and SimCLR on open_clip's image tower."""
    folder = tmp_path_factory.mktemp("init")
    (folder / "data").mkdir()
    pool = make_pool(folder / "data")
    cases = {"clip": {}, "simclr": CASES["simclr"], "tower": {"objective": "simclr"}}
    for name, case in cases.items():
        run(pool, folder / name, config(**case, samples_seen=24))
    return {name: folder / name for name in cases}


def start(init: Any, **case: Any) -> Any:
    return make_objective(config(**case, init=str(init)), seed=3)


def test_the_towers_start_from_a_checkpoint(trained: dict[str, Path]) -> None:
    weights = load_file(trained["clip"] / "model.safetensors")
    for name in ("clip", "siglip"):
        found = start(trained["clip"], objective=name).weights()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_networks_of_timm_start_from_a_checkpoint(name: str, trained: dict[str, Path]) -> None:
    objective = start(trained["simclr"], **CASES[name])
    weights = load_file(trained["simclr"] / "model.safetensors")
    assert all(torch.equal(objective.weights()[key], value) for key, value in weights.items())
    if name == "moco":  # the key encoder begins as the query encoder
        teacher = objective.teacher_net.state_dict()
        assert all(torch.equal(teacher[key], value) for key, value in weights.items())


def test_an_image_tower_goes_into_and_out_of_two_towers(trained: dict[str, Path]) -> None:
    clip, tower = (load_file(trained[name] / "model.safetensors") for name in ("clip", "tower"))
    alone = start(trained["clip"], objective="simclr").weights()
    assert all(torch.equal(alone[f"trunk.{key[7:]}"], clip[key]) for key in clip if key.startswith("visual."))
    both = start(trained["tower"]).weights()
    assert all(torch.equal(both[f"visual.{key[6:]}"], value) for key, value in tower.items())
    fresh = make_objective(config(), seed=3).weights()
    assert torch.equal(both["token_embedding.weight"], fresh["token_embedding.weight"])


def test_any_encoder_spec_will_do(tmp_path: Path) -> None:
    import json

    (tmp_path / "tiny.json").write_text(json.dumps(MODEL))
    torch.manual_seed(9)
    model = build_model(MODEL)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = start(f"{tmp_path}/tiny.json:{tmp_path}/w.pt").weights()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_the_content_of_the_checkpoint_is_part_of_the_identity(trained: dict[str, Path], tmp_path: Path) -> None:
    first, other = (config(init=str(trained[name])).identity() for name in ("clip", "tower"))
    assert first["init"] != other["init"]
    (tmp_path / "link").symlink_to(trained["clip"])
    assert config(init=str(tmp_path / "link")).identity() == first


def test_weights_that_do_not_fit_are_refused(trained: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no weights of the networks that are trained"):
        start("pixels:32", objective="simclr", model=NARROW)
    with pytest.raises(UsageError, match=r"is \[\d+, 16\], and here \[\d+, 24\]"):
        start(trained["clip"], model={**MODEL, "embed_dim": 24})
