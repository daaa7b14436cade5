"""When a training saves, or stops: by its steps, by the clock, or because it is asked to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.distributed import broadcast_object, rank

What = Literal["", "save", "stop"]
_EVERY = 0.5  # seconds between looks at the clock and for a request to stop


class Due:
    """What is due after a step. The first process decides it for all, so that they agree on the step.

    They exchange the decision twice a second, at steps that the first process names in advance, and not in each step.

    Args:
        config: the training's.
        first: step it starts from.
        stop: whether it is asked to stop; called in the first process only.
    """

    def __init__(self, config: PretrainConfig, first: int, stop: Callable[[], bool]) -> None:
        self.config, self.stop = config, stop
        self._saved = self._looked = time.monotonic()
        self._step, self._next = first, first + 1  # of the last look and of the next

    def after(self, step: int) -> What:
        """What is due after step number `step` (from 1), the last of which is saved anyway; all processes call it."""
        if step == self.config.steps:
            return ""
        what: What = "save" if self.config.saves_after(step) else ""
        if step == self._next:
            what, self._next = broadcast_object(self._decide(step, what) if rank() == 0 else None)
        if what:
            self._saved = time.monotonic()
        return what

    def _decide(self, step: int, what: What) -> tuple[What, int]:
        now, done = time.monotonic(), step - self._step
        ahead = min(int(done / max(now - self._looked, 1e-6) * _EVERY), 2 * done)  # the first steps may be the fastest
        self._step, self._looked = step, now
        minutes = self.config.checkpoint.save_minutes
        if self.stop():
            what = "stop"
        elif minutes is not None and now - self._saved >= 60 * minutes:
            what = "save"
        return what, step + max(1, ahead)
