import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.pretrain.test_stopping import interrupt_soon
from tests.pretrain.test_train import close, lines
from tests.pretrain.tiny import config, make_pool
from winnow.infra.pool.pool import Pool
from winnow.infra.stages import executors
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.stage import PretrainStage, TrainRun


def test_ray_train_on_two_processes_trains_as_serial(ray_executor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One of two is killed with SIGKILL; both go on from the last checkpoint, without anyone's help. (On one process:
    tests/test_stages.py.)"""
    pool = make_pool(tmp_path)
    run = TrainRun("all", 0, pool, None, Pool.open(pool).digest)
    c = config(
        objective={"tests.pretrain.mortals:KilledOnce": {"mark": str(tmp_path / "killed"), "step": 5}},
        num_processes=2,
        save_every=2,
        max_failures=1,
        log_every=1,
    )
    execute(PretrainStage(c, (run,), str(tmp_path / "out")), ray_executor)
    out = tmp_path / "out" / "all" / "seed-0"
    assert (tmp_path / "killed").exists()
    starts = [line for line in lines(out) if line.get("event") == "start"]
    assert [line["step"] for line in starts] in ([0, 4], [0, 2])
    assert {(line["via"], line["workers"]) for line in starts} == {("ray", 2)}
    assert not (out / ".ray").exists()
    whole = PretrainStage(config(), (run,), str(tmp_path / "whole"))
    execute(whole, SerialExecutor())
    close(load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "all" / "seed-0" / "model.safetensors"))


def children(name: str) -> list[psutil.Process]:
    """Processes of the tests' Ray."""
    return [process for process in psutil.Process().children(recursive=True) if name in " ".join(process.cmdline())]


def test_a_lost_controller_gives_back_what_it_holds(  # type: ignore[no-untyped-def]
    ray_session, ray_executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train's controller is killed when it has asked for all cores; the retry needs them."""
    monkeypatch.setattr(executors, "RESOURCE_LIMIT", 60.0)
    pool = make_pool(tmp_path)
    run = TrainRun("all", 0, pool, None, Pool.open(pool).digest)
    stage = PretrainStage(config(num_processes=2), (run,), str(tmp_path / "out"))
    killed = []

    def kill() -> None:
        groups = ray_session.util.placement_group_table
        while not any(group["state"] != "REMOVED" for group in groups().values()):
            time.sleep(0.05)
        for process in children("ray::TrainController"):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    manifest = execute(stage, ray_executor)
    killer.join(10)
    assert len(killed) == 1 and manifest.items == 48
    assert all(group["state"] == "REMOVED" for group in ray_session.util.placement_group_table().values())


def test_an_interrupt_saves_and_ends_a_training_on_ray(ray_executor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pool = make_pool(tmp_path)
    run = TrainRun("all", 0, pool, None, Pool.open(pool).digest)
    c = config(num_processes=2, samples_seen=4_000_000, max_failures=1)
    out = tmp_path / "out" / "all" / "seed-0"
    interrupt_soon(out)
    with pytest.raises(KeyboardInterrupt):
        execute(PretrainStage(c, (run,), str(tmp_path / "out")), ray_executor)
    stopped = lines(out)[-1]
    assert stopped["event"] == "stopped"
    assert [path.name for path in (out / "resume").iterdir()] == [f"step-{stopped['step']:08d}"]
    assert not (out / ".stop").exists() and not (out / "config.json").exists()
    assert not (tmp_path / "out" / "notes").exists() or not list((tmp_path / "out" / "notes").iterdir())
