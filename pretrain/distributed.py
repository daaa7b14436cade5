"""Features of all processes, for losses over the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather(x: torch.Tensor) -> torch.Tensor:
    """[n, …] of each process to [n·world, …], by process. The gradient sums what all processes have for its rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    everyone: torch.Tensor = _AllGather.apply(x)
    return everyone


def local_rows(x: torch.Tensor) -> torch.Tensor:
    """Where this process's n rows lie in what `gather` gives; int64 [n]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(x), device=x.device) + rank * len(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        everyone = x.new_empty((dist.get_world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        n = len(grad) // dist.get_world_size()
        if dist.get_backend() == "nccl":
            local = grad.new_empty((n, *grad.shape[1:]))
            dist.reduce_scatter_tensor(local, grad.contiguous())
            return local
        grad = grad.clone()
        dist.all_reduce(grad)  # gloo cannot reduce_scatter
        return grad[dist.get_rank() * n :][:n]
