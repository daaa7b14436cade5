"""A process group of one, for tests of what needs one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from winnow.pretrain.engine.zero import load_deepspeed
from winnow.pretrain.launch import _environment


@contextlib.contextmanager
def alone() -> Iterator[None]:
    with _environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"), tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=0, world_size=1)
        try:
            yield
        finally:
            load_deepspeed(torch.device("cpu"))
            import deepspeed.comm as ds_comm

            (ds_comm if ds_comm.is_initialized() else dist).destroy_process_group()
