"""Objectives with several players, each with an engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain import mortal
from tests.pretrain.test_resume import job, weights
from tests.pretrain.test_train import lines, run, same
from tests.pretrain.tiny import NARROW, changed, config, make_pool
from winnow.infra.errors import UsageError
from winnow.pretrain.checkpoint.resume import STATE
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.loop import make_objective

GAN = "tests.pretrain.gan:Gan"
VIT = {"timm": "vit_tiny_patch16_224", "size": 32, "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2}}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def whole(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gan")
    run(pool, out, settings())
    return out


def settings(**changes: Any) -> Any:
    return config(**{"objective": GAN, "model": VIT, "log_every": 1} | changes)


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out) if "critic" in line]


def test_turns_are_those_of_a_plain_loop(pool: str, whole: Path) -> None:
    """Two AdamW of torch's, each with its rate, over the same batches."""
    c = settings()
    objective: Any = make_objective(c, seed=0)
    critic = [p for module in (objective.net, objective.head) for p in module.parameters()]
    groups = [{"params": [p for p in critic if p.ndim < 2], "weight_decay": 0.0}]
    groups.append({"params": [p for p in critic if p.ndim >= 2], "weight_decay": 0.2})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    slow = torch.optim.AdamW(objective.generator.parameters(), betas=(0.5, 0.999), eps=1e-6, weight_decay=0.0)
    expected = []
    with Batches(Samples(pool), objective.views, seed=0, batch=8, last=6) as batches:
        for step, arrays in enumerate(batches):
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            warm = (step + 1) / 2 if step < 2 else None
            rates = {
                "critic": 1e-2 * (warm or 0.5 * (1 + np.cos(np.pi * (step - 2) / 4))),
                "generator": 1e-3 * (warm or 1),
            }
            for name, optimizer in (("critic", adam), ("generator", slow)):
                for group in optimizer.param_groups:
                    group["lr"] = rates[name]
                objective.zero_grad()
                loss = objective(batch, name).total
                loss.backward()
                optimizer.step()
                expected.append((name, loss.item(), rates[name]))
    logged = [(name, line[name], line[f"lr/{name}"]) for line in steps(whole) for name in ("critic", "generator")]
    assert [name for name, *_ in logged] == [name for name, *_ in expected]
    np.testing.assert_allclose([row[1:] for row in logged], [row[1:] for row in expected], rtol=1e-3)
    state = load_file(whole / "resume" / "step-00000006" / STATE)
    for name, value in objective.named_parameters():
        torch.testing.assert_close(state[f"model/{name}"], value.detach(), rtol=1e-2, atol=1e-3)


def test_each_player_has_its_gradient_norm(whole: Path) -> None:
    assert all(line["grad_norm/critic"] > 0 and line["grad_norm/generator"] > 0 for line in steps(whole))


def test_killed_and_resumed_it_ends_in_the_same_bits(pool: str, tmp_path: Path) -> None:
    case = {"objective": {GAN: {"generator_every": 2}}, "model": VIT, "save_every": 1}
    uninterrupted, killed = (job(pool, tmp_path / name, **case) for name in ("whole", "killed"))
    assert mortal.run(uninterrupted, tmp_path) == [0]
    for step in (1, 4):
        assert mortal.run(killed, tmp_path, die_at=step)[0] != 0
    assert mortal.run(killed, tmp_path) == [0]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    last = f"resume/step-00000006/{STATE}"
    assert same(load_file(tmp_path / "killed" / last), load_file(tmp_path / "whole" / last))
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert ["generator" in line for line in steps(tmp_path / "whole")] == [False, True] * 3


def metrics_of(out: Path) -> list[dict[str, Any]]:
    clock = ("time", "samples_per_second", "samples_per_second_per_worker", "data_wait")
    return [{key: value for key, value in line.items() if key not in clock} for line in steps(out)]


def test_two_processes_have_equal_losses(pool: str, whole: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, settings(num_processes=2))
    for name in ("critic", "generator"):
        ours, reference = ([line[name] for line in steps(out)] for out in (tmp_path, whole))
        assert ours == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_the_same(stage: int, pool: str, whole: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, settings(zero_stage=stage))
    for name in ("critic", "generator"):
        ours, reference = ([line[name] for line in steps(out)] for out in (tmp_path, whole))
        assert ours == pytest.approx(reference, rel=1e-3)


def test_each_player_has_its_loss_scale(pool: str, tmp_path: Path) -> None:
    run(pool, tmp_path, settings(precision="fp16"))
    assert all(line["loss_scale/critic"] >= 1 and line["loss_scale/generator"] >= 1 for line in steps(tmp_path))
    assert {"critic", "generator"} == set(_scaler(tmp_path))


def _scaler(out: Path) -> dict[str, Any]:
    scaler: dict[str, Any] = json.loads((out / "resume" / "step-00000006" / "checkpoint.json").read_text())["scaler"]
    return scaler


def test_what_players_cannot_do_is_refused(pool: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has several players.*zero_stage 2 or lower"):
        run(pool, tmp_path, settings(zero_stage=3))
    with pytest.raises(UsageError, match=r"must be of one player: generator\.0\.bias is of no"):
        run(pool, tmp_path, settings(objective="tests.pretrain.gan:Incomplete"))


def test_accumulation_is_refused_with_batch_normalisation(pool: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has batch normalisation") as error:
        run(pool, tmp_path, settings(model=NARROW, accumulation_steps=2))
    assert error.value.where == "parallel.accumulation_steps"
    run(pool, tmp_path, changed(settings(), accumulation_steps=2, samples_seen=24))
    assert len(steps(tmp_path)) == 3
