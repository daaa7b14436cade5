"""Trainings of a few steps on a part of each batch, in a separate module so that the processes import little."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from tests.pretrain.tiny import CASES as CONFIGS
from tests.pretrain.tiny import config
from winnow.pretrain.loop import make_objective
from winnow.pretrain.objectives.contrastive.siglip import siglip_loss
from winnow.pretrain.objectives.contrastive.simclr import nt_xent


def part(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return x[rank * len(x) // world : (rank + 1) * len(x) // world]


def averaged(values: list[torch.Tensor], world: int) -> list[torch.Tensor]:
    """As data parallelism averages gradients."""
    if world > 1:
        for value in values:
            dist.all_reduce(value)
            value /= world
    return values


def of_two_towers(loss_of: Callable[..., torch.Tensor], rank: int, world: int) -> list[torch.Tensor]:
    """Value and gradients of a loss over two linear towers and two scalars, float64."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 8, 6)))
    torch.manual_seed(0)
    towers = [torch.nn.Linear(6, 5).double() for _ in range(2)]
    scalars = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (1.3, -0.7)]
    a, b = (torch.nn.functional.normalize(t(part(v, rank, world)), dim=1) for t, v in zip(towers, x, strict=True))
    loss = loss_of(a, b, *scalars)
    parameters = [parameter for tower in towers for parameter in tower.parameters()] + scalars
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return averaged([loss.detach(), *[grad for grad in grads if grad is not None]], world)


def of_three_steps(name: str, rank: int, world: int) -> list[torch.Tensor]:
    """Losses, weights, teacher, queue and running statistics after three steps of SGD, float32."""
    objective = make_objective(config(**CONFIGS[name]), seed=0)
    rng = np.random.default_rng(0)
    losses = []
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for step in range(3):
        images = torch.from_numpy(rng.integers(0, 256, (16, 2, 3, 32, 32), dtype=np.uint8))
        index = torch.from_numpy(rng.integers(1 << 62, size=16))
        batch = {"views": images, "query": images[:, 0], "key": images[:, 1], "index": index}
        loss = objective({key: part(value, rank, world) for key, value in batch.items()}).total
        grads = averaged(list(torch.autograd.grad(loss, trained)), world)
        losses += averaged([loss.detach()], world)
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                parameter -= 0.1 * grad
            objective.after_step(step + 1)
    state = objective.state_dict()
    # The key encoder normalises by the batch it is given; its running statistics are of no use to anyone.
    return losses + [state[key] for key in sorted(state) if not ("teacher" in key and "running" in key)]


CASES: dict[str, Callable[[int, int], list[torch.Tensor]]] = {
    "siglip loss": lambda rank, world: of_two_towers(lambda *args: siglip_loss(*args)[0], rank, world),
    "simclr loss": lambda rank, world: of_two_towers(lambda a, b, *_: nt_xent(a, b, 0.3)[0], rank, world),
    "simclr": lambda rank, world: of_three_steps("simclr", rank, world),
    "moco": lambda rank, world: of_three_steps("moco", rank, world),
}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: case(rank, 2) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
