"""The networks of diffusion trainings: diffusers' U-Net, its noise schedule and its condition, and the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from winnow.infra.errors import UsageError
from winnow.pretrain.diffusion.samplers import ancestral, ddim, guided
from winnow.pretrain.diffusion.schedule import Noise, alpha_bars, noised, parts
from winnow.pretrain.models.tokenizer import build_tokenizer

# Latents have unit variance, so this clips only at the first steps, where x_0 is a quotient by nearly zero.
_LATENT_CLIP = 10.0
SAMPLERS = ("ddim", "ancestral")


def _build(make: Any, **given: Any) -> Any:
    try:
        return make(**given)
    except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise UsageError(f"{make.__name__} cannot be built: {error}", where="model") from error


def _preprocess(size: int) -> dict[str, Any]:
    """open_clip's preprocess_cfg for images from -1 to 1."""
    half = (0.5, 0.5, 0.5)
    return {"size": (size, size), "mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL, and the standard deviation of its latents.

    Args:
        config: {"autoencoder": its arguments}.

    Attributes:
        latent_std: of all values of the latents, [1]; what `latents` divides by (Rombach et al. 2022, appendix G).
    """

    latent_std: torch.Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.config = config
        self.net = _build(AutoencoderKL, **config["autoencoder"])
        self.size: int = config["autoencoder"]["sample_size"]
        self.preprocess_cfg = _preprocess(self.size)
        channels = len(self.net.config.block_out_channels)
        side = self.size // 2 ** (channels - 1)
        self.shape = (int(self.net.config.latent_channels), side, side)
        self.register_buffer("latent_std", torch.ones(1))

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """Images from -1 to 1, [n, 3, H, W], to the means of their latents in units of `latent_std`, [n, c, h, w]."""
        mean: torch.Tensor = self.net.encode(image).latent_dist.mode()
        return mean / self.latent_std.view(1, 1, 1, 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents in units of `latent_std`, [n, c, h, w], to images from -1 to 1, [n, 3, H, W]."""
        image: torch.Tensor = self.net.decode(latents * self.latent_std.view(1, 1, 1, 1)).sample
        return image

    def feature_maps(self, image: torch.Tensor) -> torch.Tensor:
        return self.latents(image)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """All latents of each image, [n, c·h·w]."""
        return self.latents(image).flatten(1)


class Diffusion(nn.Module):
    """A denoising network with its schedule and condition, which can be sampled from.

    Args:
        config: `unet`; `text` when captions are the condition; `autoencoder` in latent diffusion; and `diffusion`:
            schedule, timesteps, prediction, classes (names, or None), feature_timestep, captions (of the grid).
    """

    signal: torch.Tensor
    sigma: torch.Tensor
    feature_noise: torch.Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel, UNet2DModel
        from open_clip.transformer import TextTransformer

        self.config, about = config, config["diffusion"]
        self.prediction = about["prediction"]
        self.classes: list[str] | None = about["classes"]
        self.autoencoder: Autoencoder | None = None
        given = dict(config["unet"])
        self.size, self.shape = given["sample_size"], (3, given["sample_size"], given["sample_size"])
        if "autoencoder" in config:
            self.autoencoder = Autoencoder(config).requires_grad_(False)
            self.size, self.shape = self.autoencoder.size, self.autoencoder.shape
            if (side := given["sample_size"]) != self.shape[1]:
                what = f"sample_size is {side}, the autoencoder's latents have {self.shape[1]} a side"
                raise UsageError(what, where="model: unet")
        given |= {"in_channels": self.shape[0], "out_channels": self.shape[0]}
        self.text: Any = None
        if "text" in config:
            self.tokenizer = build_tokenizer({"text_cfg": config["text"]})
            self.text = _build(TextTransformer, **config["text"], proj_type="none", output_tokens=True)
            self.unet = _build(UNet2DConditionModel, **given, cross_attention_dim=self.text.width)
        else:
            embeddings = {} if self.classes is None else {"num_class_embeds": len(self.classes) + 1}
            self.unet = _build(UNet2DModel, **given, **embeddings)
        if self.unet.mid_block is None:
            raise UsageError("the U-Net needs a middle block, whose features are evaluated", where="model: unet")
        self.alpha_bar = alpha_bars(about["schedule"], about["timesteps"])
        self.feature_timestep: int = about["feature_timestep"]
        self.preprocess_cfg = _preprocess(self.size)
        for name, values in (("signal", self.alpha_bar), ("sigma", 1 - self.alpha_bar)):
            self.register_buffer(name, torch.from_numpy(np.sqrt(values)).float(), persistent=False)
        self.register_buffer("feature_noise", Noise([0], self.shape)(), persistent=False)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ and √(1 − ᾱ) of timesteps, [n, 1, 1, 1] each."""
        return self.signal[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """What is diffused, [n, c, h, w], of images from -1 to 1, [n, 3, H, W]."""
        if self.autoencoder is None:
            return image
        with torch.no_grad():
            return self.autoencoder.latents(image)

    def condition(self, labels: Any) -> dict[str, torch.Tensor]:
        """What the U-Net takes for labels int [n] (the number of classes: no label), or tokens int [n, context]."""
        if self.text is not None:
            return {"encoder_hidden_states": self.text(labels.long())[1]}
        return {} if self.classes is None else {"class_labels": labels.long()}

    def nothing(self, n: int) -> Any:
        """The labels or tokens of n samples without a condition."""
        device = self.signal.device
        if self.text is not None:
            return self.tokenizer([""] * n).to(device)
        return None if self.classes is None else torch.full((n,), len(self.classes), device=device)

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The prediction, float32 [n, c, h, w], for x of timesteps t, int64 [n]."""
        # Convolutions are a quarter faster with channels last.
        output: torch.Tensor = self.unet(x.contiguous(memory_format=torch.channels_last), t, **condition).sample
        return output.float()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """`feature_maps`, averaged over their positions, [n, d]."""
        return self.feature_maps(image).mean((2, 3))

    def feature_maps(self, image: torch.Tensor) -> torch.Tensor:
        """Features of the U-Net's middle block, float32 [n, d, h, w].

        The images, from -1 to 1, are noised as at `feature_timestep`, all with the same noise, and have no condition.
        """
        t = torch.full((len(image),), self.feature_timestep, device=image.device)
        x = noised(self.latents(image), self.feature_noise, *self.coefficients(t))
        found: list[torch.Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            self(x, t, self.condition(self.nothing(len(image))))
        finally:
            hook.remove()
        return found[0].float()

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[tuple[int, ...]],
        labels: Any,
        *,
        steps: int = 50,
        guidance: float = 0.0,
        sampler: Literal["ddim", "ancestral"] = "ddim",
        eta: float = 0.0,
    ) -> torch.Tensor:
        """Images, uint8 [n, 3, H, W], on the CPU. Up to rounding, an image depends on its seed and label alone.

        Args:
            seeds: of the noise of each.
            labels: as `condition` takes them, or None.
            steps: timesteps visited.
            guidance: w of Ho & Salimans 2022; 0 takes the condition as it is.
            sampler, eta: as in `samplers`.
        """
        device, n = self.signal.device, len(seeds)
        noise = Noise(seeds, self.shape)
        guide = bool(guidance) and labels is not None
        if guide:
            labels = torch.cat([labels, self.nothing(n)])
        condition = self.condition(labels)

        def draw() -> torch.Tensor:
            return noise().to(device)

        def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.full((n,), t, device=device)
            if guide:
                with_it, without = self(x.repeat(2, 1, 1, 1), rows.repeat(2), condition).chunk(2)
                output = guided(with_it, without, guidance)
            else:
                output = self(x, rows, condition)
            return parts(x, output, *self.coefficients(rows), self.prediction)

        clip = 1.0 if self.autoencoder is None else _LATENT_CLIP
        if sampler == "ddim":
            x = ddim(denoise, self.alpha_bar, draw(), draw, steps=steps, eta=eta, clip=clip)
        else:
            x = ancestral(denoise, self.alpha_bar, draw(), draw, steps=steps, clip=clip)
        image = x if self.autoencoder is None else self.autoencoder.decode(x).float()
        return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
