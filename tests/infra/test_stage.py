"""The Stage contract on a small stage: what is reused, redone, retried, skipped and removed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages import executors
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.resources import Resources
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import (
    Output,
    Skipped,
    Stage,
    Unit,
    read_manifest,
    record_url,
)


@dataclass
class Square(Stage):
    """Writes the square of each number; `failing` maps a number to how often it fails first."""

    numbers: tuple[int, ...]
    out: str
    power: int = 2
    failing: dict = field(default_factory=dict)
    ran: list = field(default_factory=list)
    bad: tuple = ()

    name = "square"
    version = 1
    allow_failures = True

    def params(self):
        return {"power": self.power}

    def plan(self):
        return [Unit(str(n), {"n": str(n)}, items=1) for n in self.numbers]

    def run(self, unit):
        n = int(unit.name)
        self.ran.append(n)
        if self.failing.get(n, 0) > 0:
            self.failing[n] -= 1
            raise OSError("a transient error")
        storage.write_bytes(self.url(f"{n}.txt"), str(n**self.power).encode())
        skipped = [Skipped(f"s{n}", "odd")] if n in self.bad else []
        return Output([f"{n}.txt"], 1, skipped)

    def finish(self, records):
        return Output(values={"total": len(records)})


def go(stage, **options):
    return execute(stage, SerialExecutor(), **{"budget": Budget(0), **options})


def test_second_run_does_nothing(tmp_path):
    first = go(Square((1, 2, 3), str(tmp_path)))
    again = Square((1, 2, 3), str(tmp_path))
    assert go(again) == first
    assert again.ran == []
    assert first.values == {"total": 3} and first.state == "complete"
    assert (tmp_path / "3.txt").read_text() == "9"


def test_only_new_units_are_run(tmp_path):
    go(Square((1, 2), str(tmp_path)))
    more = Square((1, 2, 5), str(tmp_path))
    go(more)
    assert more.ran == [5]


def test_changed_parameters_redo_everything(tmp_path):
    go(Square((1, 2), str(tmp_path)))
    cubes = Square((1, 2), str(tmp_path), power=3)
    manifest = go(cubes)
    assert cubes.ran == [1, 2]
    assert (tmp_path / "2.txt").read_text() == "8"
    assert manifest.params == {"power": 3}


def test_a_changed_version_redoes_everything(tmp_path, monkeypatch):
    go(Square((1,), str(tmp_path)))
    monkeypatch.setattr(Square, "version", 2)
    again = Square((1,), str(tmp_path))
    go(again)
    assert again.ran == [1]


@pytest.mark.parametrize("damage", ["file gone", "file cut", "record cut", "record of another key"])
def test_damaged_units_are_redone(tmp_path, damage):
    stage = Square((4, 5), str(tmp_path))
    before = go(stage)
    record = tmp_path / "units" / "4.json"
    if damage == "file gone":
        (tmp_path / "4.txt").unlink()
    elif damage == "file cut":
        (tmp_path / "4.txt").write_text("1")
    elif damage == "record cut":
        record.write_text(record.read_text()[:30])
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "0" * 64}))
    again = Square((4, 5), str(tmp_path))
    assert go(again) == before
    assert again.ran == [4]
    assert (tmp_path / "4.txt").read_text() == "16"


def test_a_temporary_failure_is_retried(tmp_path):
    stage = Square((1, 2), str(tmp_path), failing={2: 2})
    assert go(stage).state == "complete"
    assert stage.ran.count(2) == 3


def test_a_permanent_failure_is_skipped_within_the_budget(tmp_path):
    stage = Square(tuple(range(10)), str(tmp_path), failing={3: 99})
    manifest = go(stage, budget=Budget(0.1))
    assert manifest.state == "complete with 1 skipped"
    assert manifest.skipped["units"] == {"3": "a transient error"}
    assert manifest.values == {"total": 9}
    fixed = Square(tuple(range(10)), str(tmp_path))
    assert go(fixed).state == "complete"
    assert fixed.ran == [3]


def test_beyond_the_budget_the_run_fails_and_keeps_finished_units(tmp_path):
    stage = Square(tuple(range(10)), str(tmp_path), failing={3: 99, 4: 99})
    with pytest.raises(WinnowError, match=r"2 of 10 skipped, the budget is 10\.0%.*a transient error: 2"):
        go(stage, budget=Budget(0.1))
    assert read_manifest(str(tmp_path)) is None
    fixed = Square(tuple(range(10)), str(tmp_path))
    go(fixed)
    assert fixed.ran == [3, 4]


def test_a_budget_in_samples(tmp_path):
    stage = Square(tuple(range(10)), str(tmp_path), bad=(1, 2))
    with pytest.raises(WinnowError, match=r"2 of 12 skipped, the budget is 1 \(odd: 2\)"):
        go(stage, budget=Budget(1))
    assert go(stage, budget=Budget(2)).skipped["reasons"] == {"odd": 2}


@dataclass
class Sum(Square):
    """Writes another file when it finishes."""

    def finish(self, records):
        storage.write_bytes(
            self.url("sum.txt"), str(sum(int(record.unit) ** self.power for record in records)).encode()
        )
        return Output(["sum.txt"])


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_damaged_files_of_the_last_step_are_rewritten(tmp_path, damage):
    before = go(Sum((1, 2), str(tmp_path)))
    if damage == "gone":
        (tmp_path / "sum.txt").unlink()
    else:
        (tmp_path / "sum.txt").write_text("")
    again = Sum((1, 2), str(tmp_path))
    assert go(again) == before
    assert again.ran == [] and (tmp_path / "sum.txt").read_text() == "5"


def test_a_run_beyond_its_budget_replaces_no_earlier_output(tmp_path):
    before = go(Sum((1, 2), str(tmp_path)))
    with pytest.raises(WinnowError, match="skipped"):
        go(Sum((1, 2, 3, 4), str(tmp_path), bad=(3, 4)))
    assert (tmp_path / "sum.txt").read_text() == "5"
    assert go(Sum((1, 2), str(tmp_path))) == before


@dataclass
class Retried(Square):
    """Gives an output that the next run must redo."""

    def run(self, unit):
        return Output(**vars(super().run(unit)) | {"retry": unit.name == "2" and len(self.ran) < 4})


def test_an_output_marked_for_retry_is_redone(tmp_path):
    stage = Retried((1, 2), str(tmp_path))
    assert go(stage).values == {"total": 2}
    go(stage)
    assert stage.ran == [1, 2, 2]
    go(stage)
    go(stage)
    assert stage.ran == [1, 2, 2, 2]


def test_a_smaller_budget_is_checked_when_nothing_is_left_to_do(tmp_path):
    stage = Square(tuple(range(10)), str(tmp_path), bad=(3,))
    go(stage, budget=Budget(0.5))
    with pytest.raises(WinnowError, match="1 of 11 skipped, the budget is 0"):
        go(stage, budget=Budget(0))
    assert len(stage.ran) == 10


def test_a_budget_is_a_fraction_or_a_number():
    for wrong in (-1, float("nan")):
        with pytest.raises(UsageError, match="max_skipped"):
            Budget(wrong)


def test_a_stage_that_allows_no_failures_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(Square, "allow_failures", False)
    with pytest.raises(WinnowError, match="1 of 3 units failed; the first, 1: OSError: a transient error"):
        go(Square((0, 1, 2), str(tmp_path), failing={1: 99}), budget=Budget(0.9))


def test_a_wrong_recipe_is_not_retried(tmp_path):
    class Picky(Square):
        def run(self, unit):
            self.ran.append(unit.name)
            raise UsageError("no")

    stage = Picky((1, 2), str(tmp_path))
    with pytest.raises(UsageError):
        go(stage)
    assert stage.ran == ["1"]


def test_files_of_units_no_longer_planned_are_removed(tmp_path):
    go(Square((1, 2, 3), str(tmp_path)))
    go(Square((1,), str(tmp_path)))
    assert not (tmp_path / "3.txt").exists() and not (tmp_path / "units" / "3.json").exists()
    assert (tmp_path / "1.txt").exists()


HOLD = """
import sys, time
from tests.infra.test_stage import Square, go
class Slow(Square):
    def run(self, unit):
        print("running", flush=True)
        time.sleep(100)
go(Slow((1,), sys.argv[1]))
"""


def test_a_second_driver_is_refused_until_the_first_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"running\n"
        with pytest.raises(UsageError, match="another run is writing this directory"):
            go(Square((1, 2), str(tmp_path)))
        first.kill()
    assert go(Square((1, 2), str(tmp_path))).units == 2


def test_groups_run_together(tmp_path):
    seen = []

    class Grouped(Square):
        def plan(self):
            return [Unit(str(n), {"n": str(n)}, group=str(n % 2)) for n in self.numbers]

        def run_group(self, units):
            seen.append([unit.name for unit in units])
            return super().run_group(units)

    go(Grouped((1, 2, 3, 4, 5), str(tmp_path)))
    assert seen == [["1", "3", "5"], ["2", "4"]]
    (tmp_path / "3.txt").unlink()
    go(Grouped((1, 2, 3, 4, 5), str(tmp_path)))
    assert seen[2:] == [["3"]]


def test_ray_gives_what_serial_gives(tmp_path, ray_executor):
    serial = go(Square((1, 2, 3, 4), str(tmp_path / "serial"), bad=(2,)), budget=Budget(9))
    ray = execute(Square((1, 2, 3, 4), str(tmp_path / "ray"), bad=(2,)), ray_executor, budget=Budget(9))
    assert ray == serial
    for name in ["1.txt", "manifest.json", "units/2.json"]:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()


def test_a_worker_that_dies_is_a_failed_attempt(tmp_path, ray_executor):
    @dataclass
    class Deadly(Square):
        def run(self, unit):
            mark = storage.local_path(self.url("mark"))
            if unit.name == "2" and not mark.exists():
                mark.write_text("x")
                os._exit(1)
            return super().run(unit)

    manifest = execute(Deadly((1, 2, 3), str(tmp_path)), ray_executor, budget=Budget(0))
    assert manifest.units == 3 and (tmp_path / "2.txt").read_text() == "4"


START = """
import sys
from winnow.infra.stages.executors import RayExecutor
from winnow.infra.stages.runner import execute
from tests.infra.test_stage import Square
executor = RayExecutor(num_cpus=1)
execute(Square((1,), sys.argv[1]), executor)
executor.close()
"""


def test_a_ray_started_for_a_run_leaves_no_files(tmp_path):
    with TemporaryDirectory(dir="/tmp") as folder:  # a socket's path must be short
        env = os.environ | {"TMPDIR": folder}
        subprocess.run([sys.executable, "-c", START, tmp_path / "out"], check=True, env=env)
        assert (tmp_path / "out" / "1.txt").exists()
        assert [path for path in Path(folder).rglob("*") if path.name != "ray"] == []


@dataclass
class Warm(Square):
    """Leaves a file for each call of `setup`, and one that names the process of each unit."""

    def setup(self):
        storage.write_bytes(self.url("setup", f"{os.getpid()}-{time.monotonic_ns()}"), b"")

    def run(self, unit):
        assert storage.list_names(self.url("setup"))
        storage.write_bytes(self.url("processes", str(os.getpid())), b"")
        return super().run(unit)


@dataclass
class Kept(Warm):
    """Runs on long-lived processes; unit 2 ends its process at the first attempt."""

    keep_workers = True

    def run(self, unit):
        mark = storage.local_path(self.url("mark"))
        if unit.name == "2" and not mark.exists():
            mark.write_text("x")
            os._exit(1)
        return super().run(unit)


def test_setup_is_called_once_in_this_process(tmp_path):
    go(Warm((1, 2, 3), str(tmp_path)))
    assert len(storage.list_names(str(tmp_path / "setup"))) == 1


def test_setup_is_called_again_for_another_setup_key(tmp_path):
    class Keyed(Warm):
        def setup_key(self):
            return list(self.numbers)

    for numbers in [(1,), (1, 2), (1, 2, 3)]:
        go(Keyed(numbers, str(tmp_path)))
    assert len(storage.list_names(str(tmp_path / "setup"))) == 3


@pytest.mark.parametrize("kind", [Warm, Kept])
def test_setup_is_called_once_a_process_on_ray(tmp_path, ray_executor, kind):
    numbers = tuple(range(1, 9))
    manifest = execute(kind(numbers, str(tmp_path)), ray_executor, budget=Budget(0))
    assert manifest.units == 8 and (tmp_path / "8.txt").read_text() == "64"
    called = [name.partition("-")[0] for name in storage.list_names(str(tmp_path / "setup"))]
    assert len(called) == len(set(called)) and {path.name for path in (tmp_path / "processes").iterdir()} <= set(called)


def test_long_lived_workers_are_as_many_as_fit(tmp_path, ray_executor):
    class Wide(Warm):
        keep_workers = True
        resources = Resources(cpus=2)

    execute(Wide(tuple(range(6)), str(tmp_path)), ray_executor)
    assert len(storage.list_names(str(tmp_path / "processes"))) == 1


def test_slots_are_what_fits_the_scarcer_resource():
    wanted = Resources(cpus=4, gpus=0.5, gpu_optional=True)
    assert wanted.slots(32, 8) == 8 and wanted.slots(64, 1) == 2 and wanted.within(64, 0).slots(64, 0) == 16
    assert Resources(cpus=0).slots(1, 0) == 1


def test_errors_from_ray_keep_their_message(tmp_path, ray_executor):
    @dataclass
    class Faulty(Square):
        def run(self, unit):
            raise WinnowError("is broken", where="shard 7", do="Fix it.")

    with pytest.raises(WinnowError) as caught:
        execute(Faulty((1,), str(tmp_path)), ray_executor)
    assert str(caught.value) == "shard 7: is broken. Fix it."


def test_more_than_the_cluster_has_is_refused(tmp_path, ray_executor):
    class Greedy(Square):
        resources = Resources(cpus=999)

    with pytest.raises(UsageError, match="wants 999 CPU"):
        execute(Greedy((1,), str(tmp_path)), ray_executor)


class Holder:
    """As an actor, holds a core."""

    def started(self):
        return True


@pytest.mark.parametrize("trait", ["", "keep_workers", "launches_workers"])
def test_waiting_for_resources_has_a_limit(tmp_path, ray_executor, monkeypatch, trait):
    ray = ray_executor.connect()
    monkeypatch.setattr(executors, "RESOURCE_LIMIT", 0.3)
    monkeypatch.setattr(executors, "TICK", 0.2)
    stage = type("Wide", (Square,), {"resources": Resources(cpus=2), trait or "keep_workers": bool(trait)})
    other = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(other.started.remote())
    with pytest.raises(WinnowError, match=r"waited 0:0\d for 2 CPU, which other work"):
        execute(stage((1,), str(tmp_path)), ray_executor)
    ray.kill(other)


def test_the_record_is_the_last_thing_written(tmp_path):
    class Broken(Square):
        def run(self, unit):
            storage.write_bytes(self.url("half.txt"), b"half")
            raise KeyboardInterrupt

    stage = Broken((1,), str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        go(stage)
    assert not storage.exists(record_url(stage, "1"))
