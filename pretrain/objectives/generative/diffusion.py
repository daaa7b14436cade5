"""Denoising diffusion, with a class, a caption or nothing as its condition, on pixels or on latents.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", L_simple (equation 14); Nichol & Dhariwal 2021 for the
cosine schedule, Salimans & Ho 2022 for v, whose squared error is taken as it is (their "SNR + 1" weighting); Ho &
Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1; Rombach et al. 2022, "High-Resolution Image Synthesis
with Latent Diffusion Models". The U-Net is diffusers', the text transformer, trained along, open_clip's.

Timesteps, noise and dropped conditions come with the views, from a sample's position in the order, not from torch's
generator, so that the loss is the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.params import InvalidValue, params
from winnow.pretrain.checkpoint.load import load_checkpoint
from winnow.pretrain.data.augment import random_resized_crop
from winnow.pretrain.diffusion import model as nets
from winnow.pretrain.diffusion.sampling import default_labels, grid, image_seeds, square
from winnow.pretrain.diffusion.schedule import noised, velocity
from winnow.pretrain.models.tokenizer import caching_tokens
from winnow.pretrain.objectives.base import Losses, Objective, Sample


@params
class Config:
    """Args:
    schedule: of the noise.
    timesteps: their number.
    prediction: what the network predicts.
    classes: makes it class-conditional: the names of the classes, or their number. A sample's class is the pool's
        column `label`, or else the name that is its caption.
    drop: fraction of the samples trained without their condition, p_uncond.
    autoencoder: checkpoint of an `autoencoder` training, whose latents are diffused; frozen, and exported along.
    flip: whether half of the images are mirrored, as in Ho et al.
    feature_timestep: where `encode_image` takes its features.
    captions: of the grid of samples drawn at the end, for a caption-conditional model.
    """

    schedule: Literal["linear", "cosine"] = "linear"
    timesteps: Annotated[int, Field(ge=1)] = 1000
    prediction: Literal["epsilon", "v"] = "epsilon"
    classes: tuple[str, ...] | int | None = None
    drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    autoencoder: str | None = None
    flip: bool = True
    feature_timestep: Annotated[int, Field(ge=0)] = 10
    captions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.feature_timestep >= self.timesteps:
            raise InvalidValue("feature_timestep must be below timesteps", "feature_timestep")
        names = self.names()
        if names is not None and not 0 < len(set(names)) == len(names):
            raise InvalidValue("classes must be a list of different names, or their number", "classes")
        return self

    def names(self) -> list[str] | None:
        if isinstance(self.classes, int):
            return [str(i) for i in range(self.classes)]
        return None if self.classes is None else list(self.classes)


class Diffusion(Objective):
    """Mean squared error of the predicted noise (or v) at a random timestep."""

    network = "unet"
    checkpoints = ("autoencoder",)

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.settings, self.augment, self.classes = config, augment, config.names()
        if self.classes is not None and "text" in model:
            raise UsageError("the condition is either a class or a caption", where="objective", do="Drop one of them.")
        about = {key: getattr(config, key) for key in ("schedule", "timesteps", "prediction", "feature_timestep")}
        self.model = model | {"diffusion": {**about, "classes": self.classes, "captions": list(config.captions)}}
        autoencoder = None if config.autoencoder is None else _autoencoder(config.autoencoder)
        if autoencoder is not None:
            self.model["autoencoder"] = autoencoder.config["autoencoder"]
        self.net = nets.Diffusion(self.model)
        if autoencoder is not None:
            assert self.net.autoencoder is not None
            self.net.autoencoder.load_state_dict(autoencoder.state_dict())
        if self.net.text is not None:
            self.tokens = caching_tokens(self.net.tokenizer)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """image: uint8 [3, H, W]; noise: float32 [c, h, w]; timestep: int64 []; with a condition also label: int64 []
        of a class, or int32 [context] of a caption."""
        if self.augment is None:
            image = square(sample.image(), self.net.size)
        else:
            image = random_resized_crop(sample.image(), self.net.size, self.augment, rng)
        mirror, drop = rng.random(2) < (0.5 if self.settings.flip else 0.0, self.settings.drop)
        views = {
            "image": image[:, :, ::-1] if mirror else image,
            "timestep": np.asarray(rng.integers(self.settings.timesteps)),
            "noise": rng.standard_normal(self.net.shape, np.float32),
        }
        if self.net.text is not None:
            views["label"] = self.tokens("" if drop else sample.text)
        elif self.classes is not None:
            views["label"] = np.asarray(len(self.classes) if drop else self._class(sample))
        return views

    def _class(self, sample: Sample) -> int:
        assert self.classes is not None
        label = sample.label
        if label is None and sample.text in self.classes:
            label = self.classes.index(sample.text)
        if label is None or not 0 <= label < len(self.classes):
            found = f'the caption "{sample.text[:60]}"' if sample.label is None else f"the label {sample.label}"
            do = "Class-conditional diffusion needs a column `label` in the pool, or captions that are class names."
            raise WinnowError(f"{found} is none of the {len(self.classes)} classes", where="objective", do=do)
        return label

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        x0 = self.net.latents(batch["image"].float() / 127.5 - 1).float()
        epsilon = batch["noise"]
        a, s = self.net.coefficients(batch["timestep"])
        output = self.net(noised(x0, epsilon, a, s), batch["timestep"], self.net.condition(batch.get("label")))
        target = velocity(x0, epsilon, a, s) if self.settings.prediction == "v" else epsilon
        loss = F.mse_loss(output, target)
        return Losses(loss, {"loss": loss.detach()})

    def encoder(self) -> nn.Module:
        return self.net

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        return nets.Diffusion(model)

    @classmethod
    def images(cls, encoder: Callable[[], Any]) -> dict[str, np.ndarray]:
        """64 samples by at most 50 steps of DDIM, guided by w = 2 where there is a condition."""
        net = encoder()
        steps = min(50, len(net.alpha_bar))
        images = net.sample(image_seeds(0, 64), default_labels(net, 64), steps=steps, guidance=2.0)
        return {"samples": grid(images.numpy())}


def _autoencoder(url: str) -> nets.Autoencoder:
    model = load_checkpoint(url)
    if not isinstance(model, nets.Autoencoder):
        raise UsageError("is not an autoencoder checkpoint", where=url, do="Train one with `objective: autoencoder`.")
    return model
