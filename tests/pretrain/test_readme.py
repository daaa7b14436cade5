"""What the README shows a new user."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import winnow.pretrain
from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import NARROW, config, make_pool
from winnow.infra.params import ParameterError
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives import OBJECTIVES

README = Path(winnow.pretrain.__file__).parent / "README.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "rotation.py"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


def test_the_readme_shows_the_example() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code == EXAMPLE.read_text()
    assert len(code.splitlines()) < 60


def test_the_example_trains_out_of_tree(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rotation.py").write_text(EXAMPLE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    c = config(objective={"my_rotation:Rotation": {"rotations": 3}}, model=NARROW, log_every=1)
    run(pool, tmp_path / "out", c)
    objective: Any = make_objective(c, seed=0)
    with Batches(Samples(pool), objective.views, seed=0, batch=8, last=1) as batches:
        views = torch.from_numpy(next(batches)["views"])
    assert views.shape == (8, 3, 3, 32, 32)
    np.testing.assert_array_equal(views[:, 1], views[:, 0].numpy()[:, :, :, ::-1].transpose(0, 1, 3, 2))  # 90 degrees
    # Equation 3 of the paper, image by image and rotation by rotation.
    with torch.no_grad():
        scores = objective.head(objective.net(views.flatten(0, 1))).double().numpy().reshape(8, 3, 3)
    loss = 0.0
    for image in range(8):
        for turns in range(3):
            loss -= np.log(np.exp(scores[image, turns, turns]) / np.exp(scores[image, turns]).sum()) / (8 * 3)
    first = next(line["loss"] for line in lines(tmp_path / "out") if "loss" in line)
    assert first == pytest.approx(loss, rel=1e-4)
    with pytest.raises(ParameterError, match="rotations must be at most 4"):
        config(objective={"my_rotation:Rotation": {"rotations": 5}}, model=NARROW)


def test_the_example_trains_in_the_tree(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES.table, "rotation", "tests.examples.rotation:Rotation")
    sgd = {"model": NARROW, "log_every": 1, "optimizer": "sgd", "lr": 1e-3}
    run(pool, tmp_path / "one", config(objective="rotation", **sgd))
    whole = config(objective="tests.examples.rotation:Rotation", **sgd, num_processes=2)
    run(pool, tmp_path / "two", whole)
    one, two = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)  # through batch normalisation over both processes
    assert load_encoder(str(tmp_path / "one"), device="cpu").reads == {"image"}
