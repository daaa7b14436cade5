"""A pool and a model small enough to train in a test, and custom objectives."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from winnow.infra.params import build, params
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.uids import derived_uid
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.objectives.base import Losses, Objective, Sample
from winnow.pretrain.objectives.contrastive.clip import CLIP
from winnow.pretrain.sections import CheckpointConfig, LoggingConfig, OptimizerConfig, ParallelConfig

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 1, "layers": 1},
}
NARROW: dict[str, Any] = {
    "timm": "resnet18",
    "size": 32,
    "stem": "cifar",
    "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
}
UNET: dict[str, Any] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
}
AUTOENCODER: dict[str, Any] = {
    "autoencoder": {
        "sample_size": 16,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 3,
        "norm_num_groups": 4,
    }
}
# What makes a small training of each registered objective, over `config()`.
CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "diffusion": {"objective": {"diffusion": {"timesteps": 20, "feature_timestep": 2}}, "model": UNET},
    "autoencoder": {"objective": "autoencoder", "model": AUTOENCODER},
    "siglip": {"objective": "siglip"},
    "simclr": {"objective": "simclr", "model": NARROW},
    "moco": {
        "objective": {"moco": {"queue": 32, "bn_parts": 2, "momentum": 0.9, "dim": 16}},
        "model": NARROW,
    },
}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
DIE_AT = "PRETRAIN_TEST_DIE_AT"


def uid(i: int) -> str:
    return derived_uid("tiny", str(i))


def make_pool(folder: Path, count: int = 40, broken: tuple[int, ...] = (), shards: int = 2, first: int = 0) -> str:
    """Draw captioned images, numbered from `first`, into tars and index them; those in `broken` are cut short."""
    source = folder / "shards"
    source.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        rows = []
        with tarfile.open(source / f"{shard:05d}.tar", "w") as tar:
            for i in range(first + shard, first + count, shards):
                name = sorted(COLOURS)[i % len(COLOURS)]
                noise = rng.integers(-20, 20, (40, 48, 3))
                pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "JPEG")
                data = image.getvalue()
                if i in broken:
                    data = data[:200] + bytes(len(data) - 200)
                    data = data[: len(data) // 2]
                text = f"a {name} picture number {i}"
                for ext, content in (("jpg", data), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{i:05d}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                rows.append({"uid": uid(i), "key": f"{i:05d}", "text": text})
        pq.write_table(pa.Table.from_pylist(rows), source / f"{shard:05d}.parquet")
    execute(IndexStage((str(source),), str(folder / "pool")), SerialExecutor())
    return str(folder / "pool")


DEFAULTS: dict[str, Any] = {
    "model": MODEL,
    "samples_seen": 48,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup_steps": 2,
    "device": "cpu",
    "num_workers": 0,
    "max_failures": 0,
}
SECTIONS = {
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of all sections in one dict, as a recipe has them."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        section = next((name for name, kind in SECTIONS.items() if key in kind.model_fields and key != "name"), None)
        if key == "log_every":
            section, key = "logging", "every"
        elif key == "optimizer" and isinstance(value, str):
            section, key = "optimizer", "name"
        if section is not None:
            result[section] = result.get(section, {}) | {key: value}
        else:
            result[key] = result.get(key, {}) | value if key in SECTIONS else value
    return result


def config(**changes: Any) -> PretrainConfig:
    """A checked config; settings of the sections can be given by their own names."""
    return build(PretrainConfig, nested(DEFAULTS | changes), "").check()


def changed(c: PretrainConfig, **changes: Any) -> PretrainConfig:
    """The config with other settings."""
    values = c.model_dump(exclude_unset=True)
    for key, value in nested(changes).items():
        values[key] = values.get(key, {}) | value if key in SECTIONS else value
    return build(PretrainConfig, values, "").check()


@params
class Config:
    logit_scale_max: float = 100.0


class Dying(CLIP):
    """CLIP in a process that dies after the step the environment names."""

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if step == int(os.environ.get(DIE_AT, 0)):
            raise KeyboardInterrupt


class Brightness(Objective):
    """Predict an image's mean brightness: a loss that does not couple the batch."""

    def __init__(self, config: Any, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.head = torch.nn.Linear(3 * 16, 1)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        small = np.asarray(sample.image().resize((4, 4)), np.float32) / 255
        return {"pixels": small.reshape(-1), "target": np.asarray(sample.image(), np.float32).mean() / 255}

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        loss = (self.head(batch["pixels"])[:, 0] - batch["target"]).square().mean()
        return Losses(loss, {"squared_error": loss.detach()})

    def encoder(self) -> torch.nn.Module:
        return self.head

    def preprocess(self) -> dict[str, Any]:
        return {"size": 4}

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> torch.nn.Module:
        return torch.nn.Linear(3 * 16, 1)
