"""MoCo v1 and v2: momentum contrast.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", algorithm 1 and section 3; Chen et
al. 2020, "Improved Baselines with Momentum Contrastive Learning", for v2: a head of two layers, blur, weaker hue and
τ = 0.2 (its cosine schedule is the recipe's `schedule`).

Shuffled batch normalisation (section 3.3) prevents that shared statistics give away which key belongs to a query. The
paper has one part of the batch on each of 8 GPUs. Here the global batch has `bn_parts` parts on any number of
processes, so the training does not depend on that number.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from winnow.infra.params import InvalidValue, params
from winnow.pretrain.data.augment import Augmentation, Jitter
from winnow.pretrain.distributed import gather, local_rows
from winnow.pretrain.models.batchnorm import average_statistics, over_parts
from winnow.pretrain.models.preprocessing import image_size
from winnow.pretrain.models.towers import build_image_tower
from winnow.pretrain.objectives.base import Losses, Objective, Sample

CROPS = (0.2, 1.0)  # fraction of the area, from and to; as in the authors' code
TEMPERATURE = {1: 0.07, 2: 0.2}


@params
class Config:
    """Args:
    version: 1 or 2.
    temperature: τ; None for the version's.
    queue: keys kept as negatives.
    momentum: m of the key encoder.
    dim: of keys and queries.
    hidden: width of v2's head; None for that of the features (2048 in the paper's ResNet-50).
    blur: whether half of the views are blurred; None for the version's: 2 does, 1 does not.
    bn_parts: parts of the global batch that batch normalisation sees one by one.
    """

    version: Literal[1, 2] = 2
    temperature: Annotated[float, Field(gt=0)] | None = None
    queue: Annotated[int, Field(ge=1)] = 65536
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    dim: Annotated[int, Field(ge=1)] = 128
    hidden: Annotated[int, Field(ge=1)] | None = None
    blur: bool | None = None
    bn_parts: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _head_of_version_1(self) -> Config:
        if self.version == 1 and self.hidden is not None:
            raise InvalidValue("hidden is of version 2, whose head has two layers", "hidden")
        return self


class MoCo(Objective):
    """Tell the key of the same image, from a slowly moving encoder, from a queue of keys of earlier batches."""

    couples_batch = True  # through batch normalisation
    sync_batchnorm = False  # it sees parts of the batch
    teacher = True
    divisible = (
        ("queue", "batch_size", "whole batches of keys leave the queue, the oldest first"),
        ("batch_size", "bn_parts", "batch normalisation sees the batch in that many equal parts"),
        ("bn_parts", "num_processes", "each process has as many parts of the batch as the others"),
    )
    queue: torch.Tensor
    pointer: torch.Tensor

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.temperature = config.temperature or TEMPERATURE[config.version]
        self.momentum = config.momentum
        net = build_image_tower(model)
        blur = config.version == 2 if config.blur is None else config.blur
        self.augmentation = augmentation(config.version, image_size(net), augment or CROPS, blur)
        self.net = over_parts(net, config.bn_parts)
        self.head = projection_head(net.dim, config)
        self.teacher_net, self.teacher_head = copy.deepcopy(self.net), copy.deepcopy(self.head)
        for module in (self.teacher_net, self.teacher_head):
            module.requires_grad_(False)
        # As in the authors' code the queue begins with random keys.
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.dim), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.keys = self.queue[:0]

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """query, key: uint8 [3, H, W]; index: int64, by which the keys are shuffled."""
        query, key = (self.augmentation(sample.image(), rng) for _ in range(2))
        return {"query": query, "key": key, "index": np.asarray(rng.integers(1 << 62))}

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        q = self.head(self.net(batch["query"]))
        with torch.no_grad():
            keys = self._shuffled_keys(batch["key"], batch["index"])
        with torch.autocast(q.device.type, enabled=False):
            q = F.normalize(q.float(), dim=1)
            self.keys = F.normalize(keys.float(), dim=1)
            loss, accuracy = info_nce(q, self.keys[local_rows(q)], self.queue, self.temperature)
        return Losses(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def _shuffled_keys(self, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Keys of the global batch in its order, [n·world, dim]; the parts they were normalised in are shuffled."""
        order = gather(index).argsort()
        mine = order[local_rows(images)]
        shuffled = gather(self.teacher_head(self.teacher_net(gather(images)[mine])))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

    def after_step(self, step: int) -> None:
        """θk ← m θk + (1 − m) θq (equation 2), and the batch's keys replace the oldest."""
        for teacher, student in ((self.teacher_net, self.net), (self.teacher_head, self.head)):
            for key_weight, query_weight in zip(teacher.parameters(), student.parameters(), strict=True):
                key_weight.lerp_(query_weight, 1 - self.momentum)
        rows = torch.arange(len(self.keys), device=self.queue.device)
        self.queue[self.pointer + rows] = self.keys.to(self.queue.dtype)
        self.pointer.add_(len(self.keys)).remainder_(len(self.queue))
        average_statistics(self.net)

    def initialise(self, weights: dict[str, torch.Tensor]) -> None:
        super().initialise(weights)
        self.teacher_net.load_state_dict(self.net.state_dict())

    def encoder(self) -> nn.Module:
        """The query encoder, without its head."""
        return self.net

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        return build_image_tower(model, preprocess)


def augmentation(version: int, size: int, area: tuple[float, float], blur: bool) -> Augmentation:
    """v1's and v2's, with the strengths of the authors' code; v1 changes the colours of every view."""
    jitter, jitter_p = (Jitter(0.4, 0.4, 0.4, 0.4), 1.0) if version == 1 else (Jitter(0.4, 0.4, 0.4, 0.1), 0.8)
    return Augmentation(size, area, jitter, jitter_p=jitter_p, blur_p=0.5 if blur else 0.0)


def projection_head(dim: int, config: Config) -> nn.Module:
    """v1: one linear layer; v2: W2 ReLU(W1 h)."""
    if config.version == 1:
        return nn.Linear(dim, config.dim)
    hidden = config.hidden or dim
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, config.dim))


def info_nce(
    q: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 1: cross-entropy of each query's key against the queue; and how often that key is the nearest.

    Args:
        q, key: L2-normalised, [n, d].
        queue: L2-normalised, [K, d].
        temperature: τ.
    """
    logits = torch.cat([(q * key).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return F.cross_entropy(logits, first), (logits.detach().argmax(dim=1) == 0).float().mean()
