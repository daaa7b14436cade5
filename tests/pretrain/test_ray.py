from pathlib import Path

from safetensors.torch import load_file

from tests.pretrain.test_train import close, lines
from tests.pretrain.tiny import config, make_pool
from winnow.infra.pool.pool import Pool
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
