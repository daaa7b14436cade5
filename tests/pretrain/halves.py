"""The two halves of a batch in two processes; apart from the tests so that the processes import little."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from winnow.pretrain.objectives.contrastive.clip import clip_loss


def features() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 8, 6))).double()
    return x[0], x[1]


def gradients(image: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    """Of the loss by two linear towers' weights and the logit scale, for rows of inputs."""
    torch.manual_seed(0)
    towers = [torch.nn.Linear(6, 5).double() for _ in range(2)]
    scale = torch.nn.Parameter(torch.tensor([1.3], dtype=torch.float64))
    a, b = (torch.nn.functional.normalize(tower(x), dim=1) for tower, x in zip(towers, (image, text), strict=True))
    loss, _ = clip_loss(a, b, scale.exp())
    parameters = [parameter for tower in towers for parameter in tower.parameters()] + [scale]
    return list(torch.autograd.grad(loss, parameters))


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    image, text = features()
    grads = gradients(image[rank * 4 : rank * 4 + 4], text[rank * 4 : rank * 4 + 4])
    for grad in grads:
        dist.all_reduce(grad)
        grad /= 2  # data parallelism averages
    torch.save(grads, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
