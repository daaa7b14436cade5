"""Signals during a training, checkpoints by the clock, and what a restart and a replaced training say."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from tests.field.helpers import winnow
from tests.pretrain.test_resume import job, metrics, starts, weights
from tests.pretrain.test_train import lines, run, same
from tests.pretrain.tiny import MODEL, config, make_pool
from winnow.infra.io import storage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import execute, note_url
from winnow.infra.stages.stage import Output, Stage, Unit
from winnow.pretrain.checkpoint import due
from winnow.pretrain.launch import launch
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.stage import PretrainStage, TrainRun

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def whole(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 6 steps that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    launch([job(pool, out)], via="local")
    return out


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have a training of this process get a signal in its step 3; undone by calling what is returned."""

    def arrange(number: int) -> Any:
        cls = OBJECTIVES.load("clip")
        after_step = cls.after_step

        def signalling(self: Any, step: int) -> None:
            after_step(self, step)
            if step == 3:
                signal.raise_signal(number)

        monkeypatch.setattr(due, "_EVERY", 0.0)  # a step here takes milliseconds
        monkeypatch.setattr(cls, "after_step", signalling)
        return monkeypatch.undo

    return arrange


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "resume").iterdir())


def interrupt_soon(out: Path, before: Callable[[], None] = lambda: None) -> None:
    """Send SIGINT to this process when the training in `out` has logged some steps, or after two minutes."""

    def interrupt() -> None:
        log, deadline = out / "log.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and (not log.exists() or log.read_bytes().count(b"\n") < 3):
            time.sleep(0.05)
        try:
            before()
        finally:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_step_and_the_same_bits_follow(
    number: int, pool: str, whole: Path, tmp_path: Path, signalled: Any
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    undo = signalled(number)
    with pytest.raises(KeyboardInterrupt):
        launch([job(pool, tmp_path)], via="local")
    assert [signal.getsignal(one) for one in SIGNALS] == before
    step = lines(tmp_path)[-1]["step"]
    assert lines(tmp_path)[-1]["event"] == "stopped" and 3 <= step <= 4
    assert checkpoints(tmp_path) == [f"step-{step:08d}"]
    assert not (tmp_path / "model.safetensors").exists()
    undo()
    launch([job(pool, tmp_path)], via="local")
    assert starts(tmp_path) == [0, step]
    assert same(weights(tmp_path), weights(whole)) and metrics(tmp_path) == metrics(whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_so_and_goes_on(
    number: int, status: int, pool: str, tmp_path: Path, signalled: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"model": MODEL, "samples_seen": 48, "batch_size": 8, "warmup_steps": 2}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(settings | {"parallel": {"num_workers": 0}}))
    command = ("pretrain", pool, "--config", tmp_path / "t.yaml", "--out", tmp_path / "T", "--executor", "serial")
    undo = signalled(number)
    ended, printed = winnow(*command)
    assert ended == status and "stopped; what is finished is kept" in printed
    assert "winnow: stopping" in capfd.readouterr().err
    undo()
    ended, printed = winnow(*command)
    assert ended == 0 and "Checkpoint:" in printed
    assert starts(tmp_path / "T" / "model" / "seed-0")[-1] >= 3


def test_two_processes_agree_and_outlive_the_terminals_signal(pool: str, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal's group; the launcher alone acts on it."""
    reached: set[psutil.Process] = set()

    def terminal() -> None:
        for process in psutil.Process().children(recursive=True):
            if "forkserver" in " ".join(process.cmdline()):
                reached.update(process.children(recursive=True))
        for process in reached:
            os.kill(process.pid, signal.SIGINT)

    interrupt_soon(tmp_path, terminal)
    with pytest.raises(KeyboardInterrupt):
        launch([job(pool, tmp_path, num_processes=2, num_workers=1, samples_seen=4_000_000)], via="local")
    last = lines(tmp_path)[-1]
    assert len(reached) >= 4 and last["event"] == "stopped"  # two, each with a worker that decodes
    assert checkpoints(tmp_path) == [f"step-{last['step']:08d}"]
    assert not (tmp_path / ".stop").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_by_the_clock_change_nothing(processes: int, pool: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_processes": processes, "log_every": 1, "keep": 9}
    run(pool, tmp_path / "none", config(**sizes, save_minutes=None))
    run(pool, tmp_path / "often", config(**sizes, save_minutes=1e-9))
    assert checkpoints(tmp_path / "none") == ["step-00000006"]
    assert len(checkpoints(tmp_path / "often")) > 2
    for name in ("model.safetensors", "config.json", "resume/step-00000006/state.safetensors"):
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "often" / name).read_bytes()
    assert load_file(tmp_path / "often" / "resume" / "step-00000001" / "state.safetensors")


def test_by_default_a_checkpoint_every_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.25 seconds for 20 minutes; a checkpoint by steps puts off the next by the clock."""

    def saved(steps: int, **settings: Any) -> list[float]:
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        when = due.Due(config(samples_seen=8 * steps, **settings), 0, lambda: False)
        found = []
        for step in range(1, steps + 1):
            now[0] += 0.25
            if when.after(step):
                found.append(now[0] / 60)
        return found

    assert saved(4800) == pytest.approx([5, 10, 15], abs=0.05)
    assert saved(4800, save_every=1920) == pytest.approx([5, 8, 13, 16], abs=0.05)
    assert saved(4800, save_minutes=None) == []


class Looking(Stage):
    """Its unit records the notes it finds."""

    name = "looking"
    version = 1

    def __init__(self, out: str) -> None:
        self.out = out

    def params(self) -> dict[str, Any]:
        return {}

    def plan(self) -> list[Unit]:
        return [Unit("one", {})]

    def run(self, unit: Unit) -> Output:
        return Output(values={"notes": storage.list_names(self.url("notes"))})

    def finish(self, records: list[Any]) -> Output:
        return Output(values=records[0].values)


def test_the_note_of_a_dead_run_is_not_shown(tmp_path: Path) -> None:
    stage = Looking(str(tmp_path))
    storage.write_bytes(note_url(stage, stage.plan()[0]), b"step 7/9, of a run that was killed")
    assert execute(stage, SerialExecutor()).values == {"notes": []}


def test_a_finished_training_is_not_replaced_without_a_word(pool: str, tmp_path: Path) -> None:
    def trained(**changes: Any) -> str:
        run = TrainRun("all", 0, pool, None, Pool.open(pool).digest)
        said = io.StringIO()
        execute(PretrainStage(config(**changes), (run,), str(tmp_path)), SerialExecutor(), log=RunLog(stream=said))
        return said.getvalue()

    assert "replaces" not in trained()
    assert "unchanged" in trained()
    said = trained(samples_seen=96)
    assert "replaces an earlier result of other inputs or parameters: all/seed-0 (" in said
    assert "samples_seen was 48 and is 96" in said
    assert "replaces" not in trained(samples_seen=96, save_every=3)
