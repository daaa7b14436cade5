"""What a training says of itself: JSON lines in its log, a progress note, TensorBoard, and W&B where asked for."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import torch
import torch.distributed as dist

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.progress import clock, write_note
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.engine.engine import Engine

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
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


class Boards:
    """The figures of each logged step on TensorBoard, below `<out>/tensorboard`, and on W&B if the config says so.

    TensorBoard's files are appended to, so they are written on local disks only.

    Args:
        config: the training's.
        out: URL of its directory.
        key: of its content, by which W&B knows a resumed training again.
        first: step it goes on from.
        active: False in all processes but the first.
    """

    def __init__(self, config: PretrainConfig, out: str, key: str, first: int, active: bool) -> None:
        self._board: Any = None
        self._run: Any = None
        if not active:
            return
        if storage.is_local(out):
            from torch.utils.tensorboard import SummaryWriter

            folder = str(storage.local_path(storage.join(out, TENSORBOARD)))
            # What a step wrote after the checkpoint that the training goes on from is taken back.
            self._board = SummaryWriter(folder, purge_step=first + 1) if first else _fresh(folder)
        if config.wandb is not None:
            self._run = _wandb(config, out, key)

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(known, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _fresh(folder: str) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    storage.remove(folder)
    return SummaryWriter(folder)


def _wandb(config: PretrainConfig, out: str, key: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("wandb is not installed here", where="wandb", do="pip install wandb") from None
    name = "/".join(out.rstrip("/").split("/")[-2:])
    folder = str(storage.local_path(out)) if storage.is_local(out) else None
    known = storage.digest_json([out, key])[:16]
    return wandb.init(project=config.wandb, name=name, id=known, resume="allow", dir=folder, config=config.identity())


class Report:
    """What a training says of itself.

    Args:
        config: the training's.
        log, boards: where its figures go.
        note: URL of a progress note, or "".
        first: step it goes on from.
        peak: FLOP/s of a device; None where not known.

    Attributes:
        flops: model FLOPs of a sample; None where not known.
        losses: the latest.
    """

    def __init__(
        self,
        config: PretrainConfig,
        log: StepLog,
        boards: Boards,
        note: str,
        first: int,
        peak: float | None = None,
    ) -> None:
        self.config, self.log, self.boards, self.note, self.first = config, log, boards, note, first
        self.flops: float | None = None
        self.losses: dict[str, float] = {}
        self.peak, self._replaced = peak, 0
        self._started = self._since = self._noted = time.perf_counter()
        self._since_step, self._waited = first, 0.0

    def wants(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps or step == self.first + 1

    def replaced(self, batches: Batches) -> int:
        """Images replaced so far, over all processes."""
        count = torch.tensor([batches.replaced], dtype=torch.float64)
        _sum(count)
        return self._replaced + int(count[0])

    def state(self, batches: Batches) -> dict[str, Any]:
        """What `take` wants after an interruption; all processes call it."""
        return {"replaced": self.replaced(batches), "losses": self.losses}

    def take(self, state: dict[str, Any]) -> None:
        self._replaced, self.losses = state["replaced"], state["losses"]

    def close(self) -> None:
        """Take the note away."""
        if self.note:
            storage.remove(self.note)

    def step(
        self, step: int, losses: dict[str, torch.Tensor], norm: float, lr: float, engine: Engine, batches: Batches
    ) -> None:
        """All processes call it. Raises WinnowError when the loss is not finite."""
        names = sorted(losses)
        # Processes wait for one another in every step, so the share of the slowest loader's wait is the mean at least.
        values = torch.tensor([float(losses[name]) for name in names] + [batches.waited], dtype=torch.float64)
        _sum(values)
        values /= dist.get_world_size()
        if bad := [name for name, value in zip(names, values[:-1], strict=True) if not math.isfinite(value)]:
            raise WinnowError(
                f"{bad[0]} is not finite at step {step}",
                where=self.log.url,
                do="Try a lower lr, a longer warmup, grad_clip, or precision bf16 or fp32.",
            )
        metrics = engine.metrics()
        replaced = self.replaced(batches)
        self.losses = {name: round(float(value), 6) for name, value in zip(names, values[:-1], strict=True)}
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        speed = (step - self._since_step) * self.config.batch_size / seconds
        each = speed / dist.get_world_size()
        waiting = (float(values[-1]) - self._waited) / seconds
        mfu = None if self.flops is None or self.peak is None else round(self.flops * each / self.peak, 4)
        self._since, self._since_step, self._waited = now, step, float(values[-1])
        shown: dict[str, Any] = {
            **self.losses,
            "lr": lr,
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            **{name: round(value, 6) for name, value in metrics.items()},
            "samples_per_second": round(speed, 1),
            "samples_per_second_per_worker": round(each, 1),
            "mfu": mfu,
            "data_wait": round(waiting, 4),
            "replaced": replaced,
        }
        self.log.write(step=step, samples=step * self.config.batch_size, **shown)
        self.boards.write(step, shown)
        if self.note and (now - self._noted >= _NOTE_EVERY):
            self._noted = now
            write_note(self.note, self._text(step, shown, now))

    def _text(self, step: int, shown: dict[str, Any], now: float) -> str:
        left = (now - self._started) / (step - self.first) * (self.config.steps - step)
        parts = [f"step {step}/{self.config.steps}", *(f"{name} {value:.3f}" for name, value in self.losses.items())]
        parts += [f"lr {shown['lr']:.2g}"]
        if shown["grad_norm"] is not None:
            parts += [f"grad {shown['grad_norm']:.2f}"]
        if "logit_scale" in shown:
            parts += [f"scale {shown['logit_scale']:.1f}"]
        parts += [f"{shown['samples_per_second']:,.0f} samples/s"]
        if dist.get_world_size() > 1:
            parts += [f"({shown['samples_per_second_per_worker']:,.0f} each)"]
        if shown["mfu"] is not None:
            parts += [f"MFU {shown['mfu']:.0%}"]
        parts += [f"waiting {shown['data_wait']:.0%}"]
        if shown["replaced"]:
            parts += [f"{shown['replaced']} replaced"]
        return " ".join([*parts, clock(left), "left"])


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
