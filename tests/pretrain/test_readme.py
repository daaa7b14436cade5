import re
from pathlib import Path

import numpy as np
import pytest
import torch

import winnow.pretrain
from tests.pretrain.test_train import lines, run
from tests.pretrain.tiny import NARROW, config, make_pool
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.loop import make_objective


def test_the_example_of_an_objective_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(winnow.pretrain.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_barlow.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(tmp_path)
    c = config(objective={"my_barlow:BarlowTwins": {"dim": 4}}, model=NARROW, log_every=1)
    run(pool, tmp_path / "out", c)

    objective = make_objective(c, seed=0)
    with Batches(Samples(pool, None), objective.views, seed=0, batch=8, last=1) as batches:
        views = torch.from_numpy(next(batches)["views"])
    with torch.no_grad():
        z = objective.head(objective.net(torch.cat([views[:, 0], views[:, 1]]))).double().numpy()
    # Equations 1 and 2 of the paper, term by term, of outputs without their mean over the batch.
    a, b = z[:8] - z[:8].mean(0), z[8:] - z[8:].mean(0)
    loss = 0.0
    for i in range(4):
        for j in range(4):
            c_ij = (a[:, i] * b[:, j]).sum() / np.sqrt((a[:, i] ** 2).sum()) / np.sqrt((b[:, j] ** 2).sum())
            loss += (1 - c_ij) ** 2 if i == j else 0.005 * c_ij**2
    first = next(line["loss"] for line in lines(tmp_path / "out") if "loss" in line)
    assert first == pytest.approx(loss, rel=1e-4)
