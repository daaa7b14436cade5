"""Trainings that are killed, and checkpoints that cannot be written or read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain import mortal
from tests.pretrain.test_train import close, lines, run, same
from tests.pretrain.tiny import CASES, MODEL, config, make_pool
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.pretrain.checkpoint import resume
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job
from winnow.pretrain.objectives import OBJECTIVES

THIS = "tests.pretrain.tiny"
STEPS = 6


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


def job(pool: str, out: Path, **changes: Any) -> Job:
    return Job(config(log_every=1, **changes), pool, None, str(out), seed=0, key="key")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def starts(out: Path) -> list[int]:
    return [line["step"] for line in lines(out) if line.get("event") == "start"]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The log's steps without what depends on the clock."""
    clock = {"time", "samples_per_second", "samples_per_second_per_worker", "data_wait"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines(out) if "lr" in line]


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_killed_again_and_again_it_ends_in_the_same_bits(name: str, pool: str, tmp_path: Path) -> None:
    """kill -9 after the first step, a later and the last of one training, or a later one; what is being written is
    lost with it."""
    whole = job(pool, tmp_path / "whole", **CASES[name])
    assert mortal.run(whole, tmp_path) == [0]
    killed = job(pool, tmp_path / "killed", **CASES[name], save_every=1)
    for step in (1, 4, STEPS) if name == "clip" else (4,):
        assert mortal.run(killed, tmp_path, die_at=step) == [-signal.SIGKILL]
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert mortal.run(killed, tmp_path) == [0]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert starts(tmp_path / "killed")[-1] >= (STEPS if name == "clip" else 4) - 2


@pytest.mark.parametrize("name", ["clip", "moco"])
def test_two_processes_killed_end_in_the_same_bits(name: str, pool: str, tmp_path: Path) -> None:
    whole = job(pool, tmp_path / "whole", **CASES[name], num_processes=2)
    assert mortal.run(whole, tmp_path) == [0, 0]
    killed = job(pool, tmp_path / "killed", **CASES[name], num_processes=2, num_workers=1, save_every=2)
    for step in (3, 5):
        assert mortal.run(killed, tmp_path, die_at=step)[-1] == -signal.SIGKILL
    assert mortal.run(killed, tmp_path) == [0, 0]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name", ["clip", "moco"])
def test_another_number_of_processes_goes_on(name: str, pool: str, tmp_path: Path) -> None:
    """Two processes, killed, then one: the loss curve of one process, within rounding."""
    run(pool, tmp_path / "whole", config(**CASES[name], log_every=1))
    for workers, step in ((2, 5), (1, 0)):
        killed = job(pool, tmp_path / "killed", **CASES[name], num_processes=workers, save_every=2)
        codes = mortal.run(killed, tmp_path, die_at=step)
        assert codes[-1] == (-signal.SIGKILL if step else 0)
    first, second = starts(tmp_path / "killed")
    assert first == 0 and second in (2, 4)  # the checkpoint of step 4 was perhaps being written
    ours, reference = metrics(tmp_path / "killed"), metrics(tmp_path / "whole")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in reference], rel=2e-3)


def test_another_zero_stage_goes_on(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(pool, tmp_path / "whole", config(ema=0.5, log_every=1))
    for stage, step in ((1, 2), (0, 3), (2, 5), (1, 0)):
        c = config(objective=f"{THIS}:Dying", ema=0.5, zero_stage=stage, save_every=1, log_every=1)
        monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", str(step))
        if step:
            with pytest.raises(KeyboardInterrupt):
                run(pool, tmp_path / "out", c)
        else:
            close(run(pool, tmp_path / "out", c), whole)
    assert starts(tmp_path / "out") == [0, 1, 2, 4]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_resumes_in_the_same_bits(stage: int, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(objective=f"{THIS}:Dying", zero_stage=stage, save_every=2)
    whole = run(pool, tmp_path / "whole", c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "5")
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "out", c)
    monkeypatch.setenv("PRETRAIN_TEST_DIE_AT", "0")
    assert same(run(pool, tmp_path / "out", c), whole)


def test_training_goes_on_while_a_checkpoint_is_written(
    pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 2 is held up until step 4 is done; what it holds is of step 2 all the same."""
    stepped, write = threading.Event(), resume.save_file
    cls = OBJECTIVES.load("clip")
    after_step = cls.after_step

    def held_up(tensors: Any, path: Any) -> None:
        assert stepped.wait(60)
        write(tensors, path)

    def counted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == 4:
            stepped.set()

    monkeypatch.setattr(resume, "save_file", held_up)
    monkeypatch.setattr(cls, "after_step", counted)
    run(pool, tmp_path, config(save_every=2, keep=3))
    monkeypatch.undo()
    expected = run(pool, tmp_path / "two", config(save_every=2, keep=3))
    assert same(weights(tmp_path), expected)
    for step in (2, 4, 6):
        ours, reference = (
            load_file(out / f"resume/step-{step:08d}/{resume.STATE}") for out in (tmp_path, tmp_path / "two")
        )
        assert same(ours, reference)


def test_a_full_disk_is_told_and_nothing_is_lost(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = resume.save_file

    def full(tensors: Any, path: Any) -> None:
        if ".step-00000004" in str(path):
            write(tensors, path)
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    c = config(save_every=2, log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(WinnowError) as error:
            run(pool, tmp_path, c)
    assert "no space left for the checkpoint of step 4" in str(error.value)
    assert "the training goes on from step 2" in str(error.value)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["step-00000002"]
    whole = run(pool, tmp_path / "whole", c)
    assert same(run(pool, tmp_path, c), whole)
    assert starts(tmp_path) == [0, 2]


def test_a_disk_that_is_really_full(pool: str, tmp_path: Path) -> None:
    """On a file system that holds two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(WinnowError, match="no space left"):
            run(pool, disk / "out", config(save_every=1, keep=50))
        kept = sorted(path.name for path in (disk / "out" / "resume").iterdir())
        assert kept and all(path.startswith("step-") for path in kept)
        shutil.copytree(disk / "out", tmp_path / "moved")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    whole = run(pool, tmp_path / "whole", config())
    assert same(run(pool, tmp_path / "moved", config(keep=50)), whole)
    assert starts(tmp_path / "moved")[-1] == int(kept[-1].removeprefix("step-"))


def test_other_errors_of_the_writer_come_out(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(tensors: Any, path: Any) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(resume, "save_file", denied)
    with pytest.raises(PermissionError):
        run(pool, tmp_path, config(save_every=2))


@pytest.mark.parametrize("lost", [resume.STATE, resume.LISTING, "all"])
def test_a_damaged_checkpoint_is_passed_over(lost: str, pool: str, tmp_path: Path) -> None:
    c = config(save_every=2, keep=2)
    whole = run(pool, tmp_path, c)
    (tmp_path / "model.safetensors").unlink()
    last = tmp_path / "resume" / "step-00000006"
    if lost == "all":
        shutil.rmtree(last)
    else:
        (last / lost).write_bytes((last / lost).read_bytes()[:-20])
    assert same(run(pool, tmp_path, c), whole)
    reported = [line["what"] for line in lines(tmp_path) if line.get("event") == "checkpoint passed over"]
    assert reported == ([] if lost == "all" else [f"step-00000006 is damaged ({lost})"])
    assert starts(tmp_path) == [0, 4]


def test_what_a_killed_writer_left_is_no_checkpoint(pool: str, tmp_path: Path) -> None:
    c = config(save_every=2)
    whole = run(pool, tmp_path, c)
    part = tmp_path / "resume" / ".step-00000008.part"
    shutil.copytree(tmp_path / "resume" / "step-00000006", part)
    shutil.rmtree(tmp_path / "resume" / "step-00000006")
    assert same(run(pool, tmp_path, c), whole)
    assert starts(tmp_path) == [0, 4]
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_checkpoint_of_another_objective_or_shape_is_refused(pool: str, tmp_path: Path) -> None:
    run(pool, tmp_path, config())
    before = (tmp_path / "resume" / "step-00000006" / resume.STATE).read_bytes()
    with pytest.raises(WinnowError, match="is a checkpoint of clip, the training is of simclr"):
        run(pool, tmp_path, config(**CASES["simclr"]))
    wider = {**MODEL, "embed_dim": 24}
    with pytest.raises(
        WinnowError, match=r"other networks: net\.text_projection is \[16, 16\] there and \[16, 24\] here"
    ):
        run(pool, tmp_path, config(model=wider))
    deeper = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "layers": 2}}
    with pytest.raises(WinnowError, match="is none there and"):
        run(pool, tmp_path, config(model=deeper))
    assert (tmp_path / "resume" / "step-00000006" / resume.STATE).read_bytes() == before


def test_checkpoints_execute_nothing(pool: str, tmp_path: Path) -> None:
    """Only safetensors and JSON lie in them."""
    run(pool, tmp_path, config())
    kinds = {path.suffix for path in (tmp_path / "resume").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_an_object_store_keeps_whole_checkpoints(
    pool: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"memory://{request.node.name}"
    write_json = storage.write_json

    def cut_off(url: str, value: Any) -> None:
        if "step-00000004" in url:
            raise KeyboardInterrupt
        write_json(url, value)

    task = Job(config(save_every=2), pool, None, out, seed=0, key="key")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", cut_off)
        patch.setattr(threading, "excepthook", lambda *_: None)
        patch.setattr(OBJECTIVES.load("clip"), "after_step", _dies_at_5)
        with pytest.raises(KeyboardInterrupt):
            launch([task], via="local")
    launch([task], via="local")
    log = [json.loads(line) for line in storage.read_bytes(f"{out}/log.jsonl").decode().splitlines()]
    assert [line["step"] for line in log if line.get("event") == "start"] == [0, 2]


def _dies_at_5(self: Any, step: int) -> None:
    if step == 5:
        raise KeyboardInterrupt


def test_killed_while_writing_checkpoints(pool: str, tmp_path: Path) -> None:
    """kill -9 from outside at whatever moment, again and again, until it is done."""
    whole = run(pool, tmp_path / "whole", config())
    killed = job(pool, tmp_path / "killed", save_every=1)
    for attempt in range(30):
        (process,) = mortal.start(killed, tmp_path / f"meet-{attempt}", 0)
        process.join(timeout=0.4 + 0.15 * attempt)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        time.sleep(0.05)
    assert process.exitcode == 0
    assert same(weights(tmp_path / "killed"), whole)


LAUNCHED = """
import sys
from winnow.pretrain.launch import launch
from tests.pretrain.test_resume import Path, job
launch([job(sys.argv[1], Path(sys.argv[2]), num_processes=2, batch_size=4, samples_seen=400_000)])
"""


def test_processes_end_with_the_one_that_launched_them(pool: str, tmp_path: Path) -> None:
    """Killed, it cannot tell them; and what they wrote would stand in the place of another training's."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHED, pool, str(tmp_path / "out")])
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(metrics(tmp_path / "out")) > 2):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.2)
    launcher.kill()
    launcher.wait()
    size, still = -1, 0
    while still < 3:  # a second and a half without a step, of which there are dozens a second
        still = still + 1 if log.stat().st_size == size else 0
        size = log.stat().st_size
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(metrics(tmp_path / "out")) < 100_000
