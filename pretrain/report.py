"""What a training says of itself: JSON lines in its log and a progress note."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import torch
import torch.distributed as dist

from infra import storage
from infra.progress import clock, write_note
from pretrain.config import PretrainConfig
from pretrain.data import Batches
from pretrain.engine import Engine

LOG = "log.jsonl"
_NOTE_EVERY = 2.0


class StepLog:
    """JSON lines of a training, below its directory; a resumed training goes on from the lines up to its step.

    Where files cannot be appended to (object stores), they are written whole at each call of `flush`.
    """

    def __init__(self, url: str, first: int, active: bool) -> None:
        self.url, self.active = url, active
        self.lines: list[str] = []
        if not active:
            return
        if first and storage.exists(url):
            for line in storage.read_bytes(url).decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError, AttributeError):
                    if json.loads(line).get("step", 0) <= first:
                        self.lines.append(line)
        self.flush()

    def write(self, **facts: Any) -> None:
        if not self.active:
            return
        line = json.dumps({"time": round(time.time(), 3), **facts}, ensure_ascii=False)
        if storage.is_local(self.url):
            with open(storage.local_path(self.url), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            self.lines.append(line)
            self.flush()

    def flush(self) -> None:
        storage.write_bytes(self.url, "".join(line + "\n" for line in self.lines).encode())


class Report:
    """What a training says of itself: lines in the log and a progress note."""

    def __init__(self, config: PretrainConfig, log: StepLog, note: str, first: int, replaced: int) -> None:
        self.config, self.log, self.note, self.first, self._replaced = config, log, note, first, replaced
        self.losses: dict[str, float] = {}
        self._started = self._since = self._noted = time.perf_counter()
        self._since_step, self._waited = first, 0.0

    def wants(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps or step == self.first + 1

    def replaced(self, batches: Batches) -> int:
        """Pictures replaced so far, over all processes."""
        count = torch.tensor([batches.replaced], dtype=torch.float64)
        _sum(count)
        return self._replaced + int(count[0])

    def close(self) -> None:
        """Take the note away."""
        if self.note:
            storage.remove(self.note)

    def step(
        self, step: int, losses: dict[str, torch.Tensor], norm: float, lr: float, engine: Engine, batches: Batches
    ) -> None:
        """All processes call it."""
        names = sorted(losses)
        # Processes wait for one another in every step, so the share of the slowest loader's wait is the mean at least.
        values = torch.tensor([float(losses[name]) for name in names] + [batches.waited], dtype=torch.float64)
        _sum(values)
        values /= dist.get_world_size()
        figures = engine.figures()
        replaced = self.replaced(batches)
        self.losses = {name: round(float(value), 6) for name, value in zip(names, values[:-1], strict=True)}
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        speed = (step - self._since_step) * self.config.batch_size / seconds
        waiting = (float(values[-1]) - self._waited) / seconds
        self._since, self._since_step, self._waited = now, step, float(values[-1])
        self.log.write(
            step=step,
            samples=step * self.config.batch_size,
            **self.losses,
            lr=lr,
            grad_norm=round(norm, 6),
            **{name: round(value, 6) for name, value in figures.items()},
            samples_per_second=round(speed, 1),
            data_wait=round(waiting, 4),
            replaced=replaced,
        )
        if self.note and (now - self._noted >= _NOTE_EVERY):
            self._noted = now
            done = step - self.first
            left = (now - self._started) / done * (self.config.steps - step)
            parts = " ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
            text = f"step {step}/{self.config.steps} {parts} {speed:,.0f} samples/s {clock(left)} left"
            write_note(self.note, text)


def _sum(values: torch.Tensor) -> None:
    """Add up a small CPU tensor over all processes, in place."""
    if dist.get_world_size() == 1:
        return
    if dist.get_backend() == "nccl":
        on_device = values.cuda()
        dist.all_reduce(on_device)
        values.copy_(on_device)
    else:
        dist.all_reduce(values)
