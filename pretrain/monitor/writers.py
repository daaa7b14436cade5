"""Where a training's metrics go: JSON lines, TensorBoard, and W&B where asked for."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.pretrain.config import PretrainConfig

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class StepLog:
    """JSON lines of a training; a resumed training keeps the lines up to its step.

    Where files cannot be appended to (object stores), the file is written whole at each call of `flush`.
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
        line = storage.json_line({"time": round(time.time(), 3), **facts})
        if storage.is_local(self.url):
            with open(storage.local_path(self.url), "a", encoding="utf-8") as file:
                file.write(line)
        else:
            self.lines.append(line.rstrip("\n"))
            self.flush()

    def flush(self) -> None:
        storage.write_bytes(self.url, "".join(line + "\n" for line in self.lines).encode())


class Boards:
    """The metrics of each logged step on TensorBoard, below `<out>/tensorboard`, and on W&B if the config says so.

    TensorBoard's files are appended to, so they are written on local disks only.

    Args:
        config: the training's.
        out: URL of its directory.
        key: of its content, by which W&B recognises a resumed training.
        first: step it resumes from.
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
            if not first:
                storage.remove(folder)
            # Events written after the checkpoint that the training resumes from are purged.
            self._board = SummaryWriter(folder, purge_step=first + 1 if first else None)
        if config.logging.wandb is not None:
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


def _wandb(config: PretrainConfig, out: str, key: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("wandb is not installed here", where="logging.wandb", do="pip install wandb") from None
    name = "/".join(out.rstrip("/").split("/")[-2:])
    folder = str(storage.local_path(out)) if storage.is_local(out) else None
    known = storage.digest_json([out, key])[:16]
    return wandb.init(
        project=config.logging.wandb, name=name, id=known, resume="allow", dir=folder, config=config.identity()
    )
