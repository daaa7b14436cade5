"""How much of a device's arithmetic a training uses (model FLOPs utilisation, Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from winnow.pretrain.objectives.base import Objective

# Dense bf16 and fp16 FLOP/s of the tensor cores with float32 accumulation, from NVIDIA's data sheets; the first name
# that the device's contains.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989.4e12), ("H200 NVL", 835.5e12), ("H200", 989.4e12),
    ("H100 PCIe", 756.5e12), ("H100 NVL", 835.5e12), ("H100", 989.4e12), ("H800", 989.4e12), ("A100", 312e12),
    ("A800", 312e12), ("A40", 149.7e12), ("A10G", 70e12), ("A10", 125e12), ("A30", 165e12), ("L40S", 362e12),
    ("L40", 181e12), ("L4", 121e12), ("RTX 6000 Ada", 364.2e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71.2e12),
    ("V100", 125e12), ("T4", 65e12),
)  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s a device can do in half precision; None for the CPU and for devices not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS if part in name), None)


def model_flops(objective: Objective, batch: dict[str, torch.Tensor]) -> float | None:
    """FLOPs of the forward and backward pass for one sample, without recomputed activations; None if they cannot
    be counted.

    All processes call it. The objective is put in evaluation mode (batch normalisation would see a small batch) and
    gets gradients; give one that is not trained.

    Args:
        batch: a few samples, [n, …] each, on the objective's device.
    """
    objective.eval()
    n = len(next(iter(batch.values())))
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            objective(batch).total.backward()
    except Exception:  # whatever a custom objective raises on a small batch; the value is for the log only
        return None
    return counter.get_total_flops() / n
