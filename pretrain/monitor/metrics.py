"""The metrics of a training while it runs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.progress import clock, write_note
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.distributed import add_up, world_size
from winnow.pretrain.engine.engine import Engine
from winnow.pretrain.monitor.writers import Boards, StepLog

_NOTE_EVERY = 2.0  # seconds


class Report:
    """Logs the metrics of a training.

    Args:
        config: the training's.
        log, boards: where its metrics go.
        note: URL of a progress note, or "".
        first: step it resumes from.
        peak: FLOP/s of a device; None where not known.

    Attributes:
        flops: model FLOPs of a sample; None where not known.
        losses: the latest.
    """

    def __init__(
        self, config: PretrainConfig, log: StepLog, boards: Boards, note: str, first: int, peak: float | None = None
    ) -> None:
        self.config, self.log, self.boards, self.note, self.first = config, log, boards, note, first
        self.flops: float | None = None
        self.losses: dict[str, float] = {}
        self.peak, self._replaced = peak, 0
        self._started = self._since = self._noted = time.perf_counter()
        self._since_step, self._waited = first, 0.0
        self.close()  # removes the note of processes that have died

    def wants(self, step: int) -> bool:
        return step % self.config.logging.every == 0 or step == self.config.steps or step == self.first + 1

    def replaced(self, batches: Batches) -> int:
        """Images replaced so far, over all processes."""
        count = add_up(torch.tensor([batches.replaced], dtype=torch.float64))
        return self._replaced + int(count[0])

    def state(self, batches: Batches) -> dict[str, Any]:
        """What `take` needs after an interruption; all processes call it."""
        return {"replaced": self.replaced(batches), "losses": self.losses}

    def take(self, state: dict[str, Any]) -> None:
        self._replaced, self.losses = state["replaced"], state["losses"]

    def close(self) -> None:
        """Remove the note."""
        if self.note:
            storage.remove(self.note)

    def step(
        self, step: int, losses: dict[str, torch.Tensor], facts: dict[str, float], engine: Engine, batches: Batches
    ) -> None:
        """Log a step; all processes call it.

        Args:
            step: its number, from 1.
            losses, facts: as `Engine.step` returns them.

        Raises:
            WinnowError: a loss is not finite.
        """
        waited = self._average(step, losses, batches)
        metrics = engine.metrics()
        replaced = self.replaced(batches)
        now, world = time.perf_counter(), world_size()
        seconds = max(now - self._since, 1e-9)
        speed = (step - self._since_step) * self.config.batch_size / seconds
        shown: dict[str, Any] = {
            **self.losses,
            **{name: _rounded(name, value) for name, value in facts.items()},
            **{name: round(value, 6) for name, value in metrics.items()},
            "samples_per_second": round(speed, 1),
            "samples_per_second_per_worker": round(speed / world, 1),
            "mfu": None if not self.flops or not self.peak else round(self.flops * speed / world / self.peak, 4),
            "data_wait": round((waited - self._waited) / seconds, 4),
            "replaced": replaced,
        }
        self._since, self._since_step, self._waited = now, step, waited
        self.log.write(step=step, samples=step * self.config.batch_size, **shown)
        self.boards.write(step, shown)
        if self.note and (now - self._noted >= _NOTE_EVERY):
            self._noted = now
            write_note(self.note, self._text(step, shown, now))

    def _average(self, step: int, losses: dict[str, torch.Tensor], batches: Batches) -> float:
        """Set `losses` to their means over the processes; returns the mean of the seconds spent waiting."""
        names = sorted(losses)
        # Processes wait for one another in every step, so the slowest loader takes at least the mean.
        values = torch.tensor([float(losses[name]) for name in names] + [batches.waited], dtype=torch.float64)
        values = add_up(values) / world_size()
        *means, waited = values.tolist()
        if bad := [name for name, value in zip(names, means, strict=True) if not math.isfinite(value)]:
            do = "Try a lower lr, more warmup_steps, grad_clip, or precision bf16 or fp32."
            raise WinnowError(f"{bad[0]} is not finite at step {step}", where=self.log.url, do=do)
        self.losses = {name: round(value, 6) for name, value in zip(names, means, strict=True)}
        return float(waited)

    def _text(self, step: int, shown: dict[str, Any], now: float) -> str:
        left = (now - self._started) / (step - self.first) * (self.config.steps - step)
        parts = [f"step {step}/{self.config.steps}", *(f"{name} {value:.3f}" for name, value in self.losses.items())]
        for key, title, form in (("lr", "lr", ".2g"), ("grad_norm", "grad", ".2f"), ("logit_scale", "scale", ".1f")):
            if shown.get(key) is not None:
                parts.append(f"{title} {shown[key]:{form}}")
        parts.append(f"{shown['samples_per_second']:,.0f} samples/s")
        if world_size() > 1:
            parts.append(f"({shown['samples_per_second_per_worker']:,.0f} each)")
        if shown["mfu"] is not None:
            parts.append(f"MFU {shown['mfu']:.0%}")
        parts.append(f"waiting {shown['data_wait']:.0%}")
        if shown["replaced"]:
            parts.append(f"{shown['replaced']} replaced")
        return " ".join([*parts, clock(left), "left"])


def _rounded(name: str, value: float) -> float | None:
    """A gradient norm that was not taken, or is infinite, is not shown; learning rates are exact."""
    return value if name.startswith("lr") else round(value, 6) if math.isfinite(value) else None
