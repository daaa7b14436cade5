"""Fine-tuning the whole encoder with 1 % and 10 % of the labels.

Chen et al. 2020 (SimCLR), appendix B.5: SGD with Nesterov momentum 0.9, learning rate 0.05 at batch 256, no weight
decay, no warm-up; 60 epochs with 1 %, 30 with 10 %. Deviations: batches of at most 256 instead of 4096, and the rate of
256 for the smaller ones that the smallest sets have, with no fewer than `MIN_STEPS` steps; the rate falls to 0 by a
cosine; gradients are clipped to norm 1; no random crops or flips, as they change the label in some of these sets
(digits, counts, text); the classifier starts from zero, and batch statistics stay those of the encoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from winnow.evaluate.features.embed import decode_threads
from winnow.evaluate.protocols.base import EvalSet, Features, Row, Split
from winnow.evaluate.protocols.few_labels import few_labels, few_labels_protocol
from winnow.evaluate.protocols.linear import train_split
from winnow.evaluate.protocols.zeroshot import classification_rows
from winnow.evaluate.tasks.task import NotApplicable
from winnow.infra.io.prefetch import prefetch

if TYPE_CHECKING:
    import torch

RATE = 0.05
BATCH = 256
MOMENTUM = 0.9
CLIP_NORM = 1.0
EPOCHS = {0.01: 60, 0.1: 30}
MIN_STEPS = 200
KEEP_BYTES = 1 << 30  # of decoded images

Prepare = Callable[[Image.Image], "torch.Tensor"]


def loader(split: Split, indices: np.ndarray, prepare: Prepare, threads: int) -> Callable[[np.ndarray], torch.Tensor]:
    """A function from some of the indices to their images, float32 [b, 3, H, W].

    Images are decoded in threads at each call, or once where all fit into `KEEP_BYTES`.
    """
    import torch

    def load(batch: np.ndarray) -> torch.Tensor:
        samples = split.samples([int(i) for i in batch])
        return torch.stack(list(prefetch(lambda sample: prepare(sample.image(flatten=False)), samples, threads)))

    if load(indices[:1]).nbytes * len(indices) > KEEP_BYTES:
        return load
    kept = load(indices)
    return lambda batch: kept[np.searchsorted(indices, batch)]


def tune(
    tower: torch.nn.Module,
    dim: int,
    classes: int,
    split: Split,
    indices: np.ndarray,
    prepare: Prepare,
    epochs: int,
    seed: int,
    threads: int = 2,
) -> torch.nn.Module:
    """Train an image tower with a linear classifier on it; returns images [n, 3, H, W] to scores [n, classes].

    Args:
        tower: images to features [n, dim], on the device to train on; is changed.
        split, indices: what to learn from, and which samples of it, int64, ascending.
        prepare: an image to what the tower takes.
        epochs: of those samples; more where that gives fewer than `MIN_STEPS` steps.
        seed: of the order.
        threads: that decode.
    """
    import torch
    import torch.nn.functional as F

    device = next(tower.parameters()).device
    head = torch.nn.Linear(dim, classes, device=device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model = torch.nn.Sequential(tower, head).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    per_epoch = math.ceil(len(indices) / BATCH)
    steps = max(epochs * per_epoch, MIN_STEPS)
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    epoch = (chunk for _ in itertools.count() for chunk in np.array_split(rng.permutation(indices), per_epoch))
    load, labels = loader(split, indices, prepare, threads), torch.as_tensor(split.labels)
    for batch in itertools.islice(epoch, steps):
        loss = F.cross_entropy(model(load(batch).to(device)).float(), labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
    return model


def scores_of(model: torch.nn.Module, split: Split, prepare: Prepare, threads: int = 2) -> np.ndarray:
    """A tuned model's scores of a split: float32 [n, classes]."""
    import torch

    device = next(model.parameters()).device
    indices = np.arange(len(split.labels))
    load = loader(split, indices, prepare, threads)
    with torch.inference_mode():
        found = [model(load(batch).to(device)).float().cpu() for batch in np.split(indices, indices[BATCH::BATCH])]
    return np.asarray(torch.cat(found))


def finetune(features: Features, test_set: EvalSet, fraction: float) -> list[Row]:
    """The test set's scores by the encoder tuned on a class-balanced part of the train split drawn from the seed."""
    from winnow.evaluate.protocols.logistic import torch_device

    train = train_split(features, test_set)
    assert features.encoder is not None
    encoder = features.encoder()
    indices = few_labels(train.labels, fraction, features.seed)
    tower = encoder.image_tower().to(torch_device(features.device))
    if not any(True for _ in tower.parameters()):
        raise NotApplicable("the encoder has nothing to tune")
    threads, prepare = max(1, decode_threads(features.device)), encoder.preprocess
    head = encoder.dim, len(test_set.classnames)
    model = tune(tower, *head, train, indices, prepare, EPOCHS[fraction], features.seed, threads)
    return classification_rows(scores_of(model, features.splits["test"], prepare, threads), features, test_set)


FINETUNE_1PCT = few_labels_protocol("finetune_1pct", finetune, 0.01, "pixels")
FINETUNE_10PCT = few_labels_protocol("finetune_10pct", finetune, 0.1, "pixels")
