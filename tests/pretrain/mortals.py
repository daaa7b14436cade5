"""CLIP in a process that is killed once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from winnow.infra.params import params
from winnow.pretrain.objectives.contrastive import clip


@params
class Config:
    mark: str
    step: int


class KilledOnce(clip.CLIP):
    """The second process kills itself after a step, unless the mark says that it has been done."""

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(clip.Config(), model, augment)
        self.config = config

    def after_step(self, step: int) -> None:
        super().after_step(step)
        mark = Path(self.config.mark)
        if dist.get_rank() == 1 and step == self.config.step and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
