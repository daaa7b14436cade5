"""Where units run: `serial` in this process, `ray` on a cluster or a local Ray. The results are the same."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from winnow.infra import importing
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.storage import digest_json
from winnow.infra.stages.progress import clock
from winnow.infra.stages.resources import RESOURCE_LIMIT, Resources
from winnow.infra.stages.stage import Record, Stage, Unit, attempt

TICK = 2.0  # seconds after which a text is yielded, so that the driver can look at progress notes
Group = tuple[int, list[Unit]]  # its index, and the units that run together
_thread = threading.local()
_set_up: set[str] = set()  # stages whose `setup` this process has called
_set_up_lock = threading.Lock()


def setup_token(stage: Stage) -> str:
    """Identifies what `Stage.setup` loads, so that a process calls it once."""
    return digest_json([stage.name, stage.version, stage.setup_key(), stage.out])


def run_here(stage: Stage, units: list[Unit], token: str) -> list[Record]:
    """Run one group in this process, after `Stage.setup` if this is the stage's first here."""
    if not units:  # the executor only asks whether there is room for a worker
        return []
    with _set_up_lock:
        if token not in _set_up:
            stage.setup()
            _set_up.add(token)
    return attempt(stage, units)


def on_ray() -> bool:
    """Whether the unit running here was started by the Ray executor, so that it may ask the cluster for more."""
    return getattr(_thread, "on_ray", False)


@dataclass
class Result:
    """How one group ended: its records, or the error."""

    index: int
    records: list[Record] = field(default_factory=list)
    error: Exception | None = None


class Executor(Protocol):
    """Runs groups of units. Yields a Result as each ends; every few seconds while none does, the resources that the
    stage waits for, or "" while units run."""

    def results(self, stage: Stage, groups: list[Group]) -> Iterator[Result | str]: ...

    def close(self) -> None: ...


class SerialExecutor:
    """One group after the other in this process: for tests and debugging."""

    def results(self, stage: Stage, groups: list[Group]) -> Iterator[Result | str]:
        token = setup_token(stage)
        for index, units in groups:
            try:
                result = Result(index, run_here(stage, units, token))
            except Exception as error:
                logging.getLogger(__name__).debug("unit failed", exc_info=True)
                result = Result(index, error=error)
            yield result

    def close(self) -> None:
        return


class RayExecutor:
    """Groups on Ray: as tasks, or on long-lived actors for stages that use GPUs or set `keep_workers`.

    It connects on first use, so a run with nothing to do does not start Ray.

    Args:
        address: of a running cluster ("auto", "ray://…"); None starts one on this machine unless RAY_ADDRESS is set.
        num_cpus: cores of a locally started Ray; None for all.
    """

    def __init__(self, address: str | None = None, num_cpus: int | None = None) -> None:
        self.address, self.num_cpus = address, num_cpus
        self._started = self._owns = False
        self._session: Path | None = None  # folder of a Ray that was started here

    def _would_start(self) -> bool:
        """Whether connecting would start Ray on this machine."""
        ray = sys.modules.get("ray")
        running = self._started or (ray is not None and ray.is_initialized())
        return not (running or self.address or os.environ.get("RAY_ADDRESS"))

    def connect(self) -> Any:
        """Start or join Ray; returns the ray module. Raises WinnowError when the address does not answer."""
        import ray

        if self._started:
            return ray
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS")
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if folders := os.environ.get(importing.VARIABLE):
                options["runtime_env"] = {"env_vars": {importing.VARIABLE: folders}}
            if address:
                options["address"] = address
            else:
                options |= {"include_dashboard": False, "num_cpus": self.num_cpus}
            try:
                found = getattr(ray.init(**options), "address_info", {}).get("session_dir")
            except (ConnectionError, RuntimeError, ValueError) as error:
                do = "If the cluster wants a token, set RAY_AUTH_MODE=token." if address else None
                where = address or "local Ray"
                raise WinnowError(f"Ray did not start or answer ({error})", where=where, do=do) from error
            self._owns, self._session = True, Path(found) if found and not address else None
        self._started = True
        return ray

    def results(self, stage: Stage, groups: list[Group]) -> Iterator[Result | str]:
        if stage.run_on_driver and len(groups) == 1 and self._would_start():
            return SerialExecutor().results(stage, groups)
        ray = self.connect()
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
        wanted = stage.resources.within(cpus, gpus)
        if (lacking := wanted.lacking(cpus, gpus)) is not None:
            do = "Ask for less in the recipe, or connect to a larger cluster with --address."
            raise UsageError(f"a unit of {stage.name} {lacking} in the cluster", do=do)
        slots = wanted.slots(cpus, gpus)
        if stage.launches_workers:
            return _in_threads(ray, stage, groups, slots, wanted)
        options = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "memory": wanted.memory or None}
        room = _Room(stage.name, wanted)
        if wanted.gpus or stage.keep_workers:
            return _on_actors(ray, stage, groups, min(slots, len(groups)), options, room)
        return _as_tasks(ray, stage, groups, max(8, 4 * int(cpus)), options, room)

    def close(self) -> None:
        if self._owns:
            import ray

            ray.shutdown()
            self._started = self._owns = False
            if self._session is not None:
                _remove_session(self._session)


def _remove_session(folder: Path) -> None:
    """Remove the logs and sockets that a local Ray leaves in the folder for temporary files."""
    for _ in range(10):  # while its last processes end, they still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.2)
    latest = folder.with_name("session_latest")
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


class _Room:
    """Limits how long a stage waits for resources while none of its units runs."""

    def __init__(self, stage: str, wanted: Resources) -> None:
        self.stage, self.wanted, self.since = stage, wanted, time.monotonic()

    def note(self, running: bool) -> str:
        """What the stage waits for; "" while units run. Raises WinnowError after RESOURCE_LIMIT seconds."""
        now = time.monotonic()
        if running:
            self.since = now
            return ""
        if now - self.since > RESOURCE_LIMIT:
            what = f"waited {clock(now - self.since)} for {self.wanted}, which other work on the cluster holds"
            do = "Free them, ask for less in the recipe, or run again later."
            raise WinnowError(what, where=self.stage, do=do)
        return f"waiting for {self.wanted}"


def _as_tasks(
    ray: Any, stage: Stage, groups: list[Group], window: int, options: dict[str, Any], room: _Room
) -> Iterator[Result | str]:
    """Groups as tasks, `window` at most in flight: enough to feed every core, few enough for the scheduler."""
    run = ray.remote(max_retries=0, **options)(run_here)
    shared, token = ray.put(stage), setup_token(stage)
    waiting, found_room = deque(groups), False
    # Tasks start in order, so there is room for the stage once the first, without units, has run.
    flying: dict[Any, int | None] = {run.remote(shared, [], token): None}
    try:
        while waiting or flying:
            while waiting and len(flying) < window:
                index, units = waiting.popleft()
                flying[run.remote(shared, units, token)] = index
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=TICK)
            if not ready:
                yield room.note(found_room)
            for reference in ready:
                found_room, of = True, flying.pop(reference)
                if of is not None:
                    yield _result(ray, reference, of)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)


def _on_actors(
    ray: Any, stage: Stage, groups: list[Group], count: int, options: dict[str, Any], room: _Room
) -> Iterator[Result | str]:
    """Groups on long-lived actors, one group at a time each; an actor that dies is replaced."""
    actor, shared, token = ray.remote(max_restarts=0, **options)(_Worker), ray.put(stage), setup_token(stage)
    waiting, done = deque(groups), 0
    flying: dict[Any, tuple[Any, int | None]] = {}  # the actor and the index of its group; None while it starts

    def send(worker: Any, units: list[Unit], index: int | None) -> None:
        flying[worker.run.remote(shared, units, token)] = worker, index

    # An actor gets its first group once it has started, so that no group waits for resources that others use.
    for _ in range(count):
        send(actor.remote(), [], None)
    try:
        while done < len(groups):
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=TICK)
            if not ready:
                yield room.note(any(index is not None for _, index in flying.values()))
            for reference in ready:
                worker, index = flying.pop(reference)
                result = _result(ray, reference, -1 if index is None else index)
                if index is None and result.error is not None:
                    raise WinnowError(f"a worker of {stage.name} did not start ({result.error})")
                if isinstance(result.error, ray.exceptions.RayActorError):
                    if waiting:
                        send(actor.remote(), [], None)
                elif waiting:
                    following, units = waiting.popleft()
                    send(worker, units, following)
                else:
                    ray.kill(worker)
                if index is not None:
                    done += 1
                    yield result
    finally:
        for worker, _ in flying.values():
            ray.kill(worker)


class _Worker:
    """A process that keeps what `Stage.setup` loads and runs groups one after the other."""

    def run(self, stage: Stage, units: list[Unit], token: str) -> list[Record]:
        return run_here(stage, units, token)


def _result(ray: Any, reference: Any, index: int) -> Result:
    try:
        return Result(index, ray.get(reference) or [])
    except ray.exceptions.RayTaskError as error:
        return Result(index, error=error.cause if isinstance(error.cause, Exception) else error)
    except ray.exceptions.RayError as error:
        return Result(index, error=error)


def _in_threads(ray: Any, stage: Stage, groups: list[Group], at_once: int, wanted: Resources) -> Iterator[Result | str]:
    """Groups in threads of the driver, for stages whose units ask the cluster for processes themselves."""
    token = setup_token(stage)
    notes: dict[int, str] = {}  # of the groups that wait for resources

    def here(index: int, units: list[Unit]) -> list[Record]:
        _thread.on_ray = True
        room = _Room(stage.name, wanted)
        while wanted.lacking((free := ray.available_resources()).get("CPU", 0), free.get("GPU", 0)):
            notes[index] = room.note(False)
            time.sleep(0.2)
        notes.pop(index, None)
        return run_here(stage, units, token)

    with ThreadPoolExecutor(at_once) as threads:
        flying = {threads.submit(here, index, units): index for index, units in groups}
        try:
            while flying:
                ready, _ = wait(flying, timeout=TICK, return_when=FIRST_COMPLETED)
                if not ready:
                    yield next(iter(list(notes.values())), "")
                for future in ready:
                    index, error = flying.pop(future), future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield Result(index, error=error) if error else Result(index, future.result())
        finally:
            for future in flying:
                future.cancel()


def make_executor(name: str, address: str | None = None, num_cpus: int | None = None) -> Executor:
    """`serial` or `ray`. Raises UsageError for another name."""
    if name == "serial":
        if address:
            raise UsageError("--address goes with the ray executor")
        return SerialExecutor()
    if name == "ray":
        return RayExecutor(address, num_cpus)
    raise UsageError(f'unknown executor "{name}"', do="Known: ray, serial.")
