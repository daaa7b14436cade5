"""Where units run: `serial` in this process, `ray` on a cluster or on a local one. Same code, same result."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from winnow.infra import importing
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.stages.stage import Record, Stage, Unit, attempt

TICK = 2.0  # seconds between looks at progress notes
_thread = threading.local()


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
    """Runs groups of units; yields a Result as each ends, and None now and then while nothing does."""

    name: str

    def results(self, stage: Stage, groups: list[tuple[int, list[Unit]]]) -> Iterator[Result | None]: ...

    def close(self) -> None: ...


class SerialExecutor:
    """One group after the other in this process: for tests and debugging."""

    name = "serial"

    def results(self, stage: Stage, groups: list[tuple[int, list[Unit]]]) -> Iterator[Result | None]:
        for index, units in groups:
            try:
                result = Result(index, attempt(stage, units))
            except Exception as error:
                logging.getLogger(__name__).debug("unit failed", exc_info=True)
                result = Result(index, error=error)
            yield result

    def close(self) -> None:
        return


class RayExecutor:
    """Groups as Ray tasks. Connects on first use, so a run with nothing to do starts no Ray.

    Args:
        address: of a running cluster ("auto", "ray://…"); None starts one on this machine unless RAY_ADDRESS is set.
        num_cpus: cores of a locally started Ray; None for all.
    """

    name = "ray"

    def __init__(self, address: str | None = None, num_cpus: int | None = None) -> None:
        self.address, self.num_cpus = address, num_cpus
        self._started = False
        self._owns = False

    def _would_start(self) -> bool:
        """Whether connecting means to start a Ray on this machine."""
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
                ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise WinnowError(
                    f"Ray did not start or answer ({error})",
                    where=address or "local Ray",
                    do="If the cluster wants a token, set RAY_AUTH_MODE=token." if address else None,
                ) from error
            self._owns = True
        self._started = True
        return ray

    def results(self, stage: Stage, groups: list[tuple[int, list[Unit]]]) -> Iterator[Result | None]:
        if stage.run_on_driver and len(groups) == 1 and self._would_start():
            yield from SerialExecutor().results(stage, groups)
            return
        ray = self.connect()
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
        wanted = stage.resources.within(cpus, gpus)
        if (lacking := wanted.lacking(cpus, gpus)) is not None:
            raise UsageError(
                f"a unit of {stage.name} {lacking} in the cluster",
                do="Ask for less in the recipe, or connect to a larger cluster with --address.",
            )
        if stage.launches_workers:
            fit = [there // asked for there, asked in ((cpus, wanted.cpus), (gpus, wanted.gpus)) if asked]
            yield from self._in_threads(stage, groups, max(1, int(min(fit, default=1))))
            return
        remote = ray.remote(max_retries=0, num_cpus=wanted.cpus, num_gpus=wanted.gpus, memory=wanted.memory or None)(
            _remote_attempt
        )
        shared = ray.put(stage)
        waiting = deque(groups)
        # Enough in flight to feed every core; few enough that a million units do not fill the scheduler.
        window = max(8, 4 * int(total.get("CPU", 1)))
        flying: dict[Any, int] = {}
        try:
            while waiting or flying:
                while waiting and len(flying) < window:
                    index, units = waiting.popleft()
                    flying[remote.remote(shared, units)] = index
                ready, _ = ray.wait(list(flying), num_returns=1, timeout=TICK)
                if not ready:
                    yield None
                    continue
                for reference in ready:
                    index = flying.pop(reference)
                    try:
                        yield Result(index, ray.get(reference))
                    except ray.exceptions.RayTaskError as error:
                        cause = error.cause if isinstance(error.cause, Exception) else error
                        yield Result(index, error=cause)
                    except ray.exceptions.RayError as error:
                        yield Result(index, error=error)
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)

    def _in_threads(self, stage: Stage, groups: list[tuple[int, list[Unit]]], at_once: int) -> Iterator[Result | None]:
        def here(units: list[Unit]) -> list[Record]:
            _thread.on_ray = True
            return attempt(stage, units)

        with ThreadPoolExecutor(at_once) as threads:
            flying = {threads.submit(here, units): index for index, units in groups}
            try:
                while flying:
                    ready, _ = wait(flying, timeout=TICK, return_when=FIRST_COMPLETED)
                    if not ready:
                        yield None
                    for future in ready:
                        index, error = flying.pop(future), future.exception()
                        if error is not None and not isinstance(error, Exception):
                            raise error
                        yield Result(index, error=error) if error else Result(index, future.result())
            finally:
                for future in flying:
                    future.cancel()

    def close(self) -> None:
        if self._owns:
            import ray

            ray.shutdown()
            self._started = self._owns = False


def _remote_attempt(stage: Stage, units: list[Unit]) -> list[Record]:
    return attempt(stage, units)


def make_executor(name: str, address: str | None = None, num_cpus: int | None = None) -> Executor:
    """`serial` or `ray`. Raises UsageError for another name."""
    if name == "serial":
        if address:
            raise UsageError("--address goes with the ray executor")
        return SerialExecutor()
    if name == "ray":
        return RayExecutor(address, num_cpus)
    raise UsageError(f'unknown executor "{name}"', do="Known: ray, serial.")
