"""The privates of DeepSpeed that `engine/zero.py` touches."""

import inspect

import deepspeed
import pytest
import torch

from tests.pretrain.groups import alone
from tests.pretrain.tiny import config
from winnow.infra.errors import WinnowError
from winnow.pretrain.engine import zero
from winnow.pretrain.engine.engine import Engine
from winnow.pretrain.loop import make_objective


def test_the_installed_version_is_supported() -> None:
    zero.check_version(deepspeed.__version__)


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(WinnowError, match=r'is not supported.*pip install "deepspeed>=0\.19,<0\.20"'):
        zero.check_version(version)


def test_modules_have_the_names_that_are_set() -> None:
    """Setting a name that has moved would have no effect, silently."""
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    zero.load_deepspeed(torch.device("cpu"))
    assert hasattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED")
    assert "__compatible_ops__" in vars(deepspeed.ops)
    scaler = DynamicLossScaler(2.0, 2000, 1.0, 1, False, raise_error_at_min_scale=False)
    assert all(hasattr(scaler, name) for name in zero.LossScaler._FIELDS)
    assert "__compatible_ops__" in inspect.getsource(deepspeed.ops)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_engines_have_the_names_that_are_used(stage: int) -> None:
    c = config(zero_stage=stage, precision="fp16")
    with alone():
        engine = Engine(make_objective(c, seed=0), c, torch.device("cpu"))
        ours = engine.players[""].engine
        if stage == 0:
            assert ours.torch_autocast_z0_gradscaler is not None
        else:
            partitions = ours.optimizer
            names = ["torch_autocast_gradscaler", "loss_scaler", "dynamic_loss_scale"]
            flats = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
            linking = ["_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"] if stage < 3 else []
            assert [name for name in [*names, flats, *linking] if not hasattr(partitions, name)] == []
        engine.close()
