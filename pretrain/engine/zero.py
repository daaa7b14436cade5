"""What Winnow touches of DeepSpeed beyond its documented interface, all in this file, and for known versions only.

The functions read and write DeepSpeed's partitions parameter by parameter, so that what is saved knows nothing of them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from winnow.infra.errors import WinnowError

SUPPORTED = ((0, 19), (0, 20))  # from, and before; tests/pretrain/test_zero.py checks the names used here


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, quietly. Raises WinnowError for a version this file does not know."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import logger

    check_version(deepspeed.__version__)
    logger.setLevel(logging.ERROR)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed keeps it from an earlier engine of this process
    if get_accelerator().device_name() != device.type:  # an earlier training in this process ran on another device
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CPU_Accelerator() if device.type == "cpu" else CUDA_Accelerator())
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory all-reduce for half a minute, for inference only: training
        # uses gloo. This is DeepSpeed's own table of extensions that may be built.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def check_version(version: str) -> None:
    """Raises WinnowError when the version of DeepSpeed is not one of `SUPPORTED`."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    first, end = SUPPORTED
    if not first <= found < end:
        known = f"deepspeed>={'.'.join(map(str, first))},<{'.'.join(map(str, end))}"
        raise WinnowError(f"DeepSpeed {version} is not supported", do=f'pip install "{known}"')


def destroy_group() -> None:
    """Leave the process group, and the groups that DeepSpeed made from it."""
    import deepspeed.comm as ds_comm
    import torch.distributed as dist

    (ds_comm if ds_comm.is_initialized() else dist).destroy_process_group()


def adjust(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    """Write values into ZeRO's own float32 copies of trained parameters."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    for parameter, value in zip(parameters, values, strict=True):
        if not torch.equal(safe_get_full_fp32_param(parameter), value):
            safe_set_full_fp32_param(parameter, value)


def optimizer_state(
    engine: Any, optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each trained parameter's name and the optimizer's state of it, whole; all processes call it."""
    if not engine.zero_optimization():
        for name, parameter in trained.items():
            yield name, {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    # Every partition has the same keys, and has made the same steps; none in fp16 before the first good one.
    flat: dict[str, Any] = next(iter(optimizer.state.values()), {})
    shared = {key: value for key, value in flat.items() if torch.is_tensor(value) and value.ndim == 0}
    keys = [key for key, value in flat.items() if torch.is_tensor(value) and value.ndim]
    if flat:
        _link(engine)
    for name, parameter in trained.items():
        yield name, shared | {key: safe_get_full_optimizer_state(parameter, key) for key in keys}


def restore_optimizer(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    states: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Write what `optimizer_state` returned; all processes call it."""
    if not states:
        return
    if not engine.zero_optimization():
        names = {parameter: name for name, parameter in trained.items()}
        content = optimizer.state_dict()
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        content["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
        optimizer.load_state_dict(content)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    first = next(iter(states.values()))
    partitions = engine.optimizer
    third = engine.zero_optimization_stage() == 3
    flats = partitions.fp32_partitioned_groups_flat if third else partitions.single_partition_of_fp32_groups
    for flat in flats:  # as the optimizer's first step would make them
        optimizer.state[flat] = {
            key: torch.zeros_like(flat.data) if value.ndim else value.clone() for key, value in first.items()
        }
    _link(engine)
    for name, parameter in trained.items():
        for key, value in states.get(name, {}).items():
            if value.ndim:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _link(engine: Any) -> None:
    """Link the parameters of ZeRO 1 and 2 to their states; DeepSpeed does so too early for a second group."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def loss_scaler(engine: Any, first: float) -> LossScaler:
    """The dynamic loss scaler of an fp16 engine.

    Without ZeRO that is torch's. For ZeRO DeepSpeed would use one of torch's for each group of parameters, in each
    process separately; its own, meant for fp16 weights, sees the norm over all partitions.
    """
    if not engine.zero_optimization():
        return LossScaler(engine.torch_autocast_z0_gradscaler)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    partitions = engine.optimizer
    partitions.torch_autocast_gradscaler = None
    partitions.loss_scaler = DynamicLossScaler(first, 2000, 1.0, 1, False, raise_error_at_min_scale=False)
    partitions.dynamic_loss_scale = True
    return LossScaler(partitions.loss_scaler)


class LossScaler:
    """torch's or DeepSpeed's scaler, with one interface to its state."""

    _FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, scaler: Any) -> None:
        self.scaler, self.torchs = scaler, isinstance(scaler, torch.amp.GradScaler)

    @property
    def scale(self) -> float:
        return float(self.scaler.get_scale() if self.torchs else self.scaler.cur_scale)

    def state(self) -> dict[str, Any]:
        """JSON values; the scale is understood by the other kind too."""
        if self.torchs:
            return {"scale": self.scale, "torch": self.scaler.state_dict()}
        return {"scale": self.scale, "deepspeed": {name: getattr(self.scaler, name) for name in self._FIELDS}}

    def restore(self, state: dict[str, Any]) -> None:
        if self.torchs:
            kept = {**self.scaler.state_dict(), "scale": state["scale"]}
            self.scaler.load_state_dict(state.get("torch", kept))
        else:
            for name, value in state.get("deepspeed", {"cur_scale": state["scale"]}).items():
                setattr(self.scaler, name, value)
