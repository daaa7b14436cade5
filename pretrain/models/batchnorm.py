"""Batch normalisation when a batch is divided among several processes.

By default it sees only the samples of its process, so a training would depend on the number of processes. Here it sees
the whole global batch, or fixed parts of it whatever the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from winnow.infra.errors import UsageError
from winnow.pretrain.distributed import add_up, world_size


class WholeBatchNorm(nn.SyncBatchNorm):
    """Statistics of the whole global batch, of which every process must have an equal part.

    torch's own SyncBatchNorm, which has no CPU kernel; there the same is computed with two all-reduces.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, C, …] to the same shape."""
        if x.is_cuda or not self.training:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        world = world_size()
        if world == 1:
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        others = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.to(self.weight.dtype)  # under autocast x may be half as precise
        mean = all_reduce(values.mean(others)) / world
        centred = values - mean.view(shape)
        var = all_reduce(centred.square().mean(others)) / world
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class PartBatchNorm(nn.SyncBatchNorm):
    """Statistics of each of `parts` contiguous equal parts of the global batch, as if each were on its own device.

    The running statistics move by the mean over the parts of this process; `average_statistics` makes that the mean
    over all parts.
    """

    parts: int
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, C, …] to the same shape."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        here = self.parts // world_size()
        if x.numel() // x.shape[1] <= here:
            what = f"batch normalisation has one value a part of the batch ({self.parts} parts), which has no variance"
            raise UsageError(what, do="Take a larger batch_size, or fewer parts.")
        means, variances = (value.repeat(here, 1) for value in (self.running_mean, self.running_var))
        outs = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(here), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        return torch.cat(outs)


def norm_names(module: nn.Module) -> list[str]:
    """Names of the batch normalisations in a module."""
    return [name for name, child in module.named_modules() if isinstance(child, _BatchNorm)]


def over_whole_batch(module: nn.Module) -> nn.Module:
    """The module with each batch normalisation in it replaced by `WholeBatchNorm`; names of weights stay."""
    return _replaced(module, WholeBatchNorm)


def over_parts(module: nn.Module, parts: int) -> nn.Module:
    """The module with each batch normalisation in it replaced by `PartBatchNorm`; names of weights stay."""
    return _replaced(module, PartBatchNorm, parts=parts)


def _replaced(module: nn.Module, cls: type[nn.SyncBatchNorm], **attributes: Any) -> nn.Module:
    for name, child in module.named_modules():
        plain = type(child) in (nn.BatchNorm1d, nn.BatchNorm2d)
        if isinstance(child, _BatchNorm) and not (plain and child.affine and child.momentum):
            raise UsageError(f"{name} is a custom batch normalisation ({type(child).__name__})", where="model")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.SyncBatchNorm):
            child.__class__ = cls  # torch's converter makes its own class only
            vars(child).update(attributes)
    return module


def average_statistics(module: nn.Module) -> None:
    """Replace running means and variances by their means over all processes; one all-reduce."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    values = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
    if world_size() == 1 or not values:
        return
    flat = torch.cat(values)
    add_up(flat)
    for value, mean in zip(values, (flat / world_size()).split([len(value) for value in values]), strict=True):
        value.copy_(mean)
