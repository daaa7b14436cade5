"""The group of a training's processes: its size, and what is exchanged in it. Works without a group, as one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """The first process's value, pickled, on all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def add_up(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place. A CPU tensor goes over the GPU where the backend wants that."""
    if world_size() == 1:
        return values
    if dist.get_backend() == "nccl" and not values.is_cuda:
        on_device = values.cuda()
        dist.all_reduce(on_device)
        return values.copy_(on_device)
    dist.all_reduce(values)
    return values


def gather(x: torch.Tensor) -> torch.Tensor:
    """[n, …] of each process to [n·world, …], by process. The gradient of a row is the sum over all processes."""
    if world_size() == 1:
        return x
    gathered: torch.Tensor = _AllGather.apply(x)
    return gathered


def local_rows(x: torch.Tensor) -> torch.Tensor:
    """Indices of this process's n rows in what `gather` returns; int64 [n]."""
    return torch.arange(len(x), device=x.device) + rank() * len(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        n = len(grad) // world_size()
        if dist.get_backend() == "nccl":
            local = grad.new_empty((n, *grad.shape[1:]))
            dist.reduce_scatter_tensor(local, grad.contiguous())
            return local
        grad = grad.clone()
        dist.all_reduce(grad)  # gloo cannot reduce_scatter
        return grad[rank() * n :][:n]
