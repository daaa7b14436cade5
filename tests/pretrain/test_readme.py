import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
from pretrain.data import Batches, Samples
from pretrain.loop import make_objective
from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import config, make_pool


def test_the_example_of_an_objective_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(pretrain.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_siglip.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    pool, c = make_pool(tmp_path), config(objective={"my_siglip:SigLIP": {"bias": -5.0}}, log_every=1)
    run(pool, tmp_path / "out", c)

    objective = make_objective(c, seed=0)
    with Batches(Samples(pool, None), objective.views, seed=0, batch=8, last=1) as batches:
        batch = {name: torch.from_numpy(array) for name, array in next(batches).items()}
    with torch.no_grad():
        images, texts, scale = (value.double().numpy() for value in objective.features(batch))
    # Equation 1 of the paper, term by term.
    terms = [
        math.log(1 / (1 + math.exp((1 if i == j else -1) * (-scale[0] * np.dot(x, y) + 5.0))))
        for i, x in enumerate(images)
        for j, y in enumerate(texts)
    ]
    first = next(line["loss"] for line in lines(tmp_path / "out") if "loss" in line)
    assert first == pytest.approx(-sum(terms) / 8, rel=1e-5)
