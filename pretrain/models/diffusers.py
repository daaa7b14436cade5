"""diffusers' networks: their arguments, checked before they are built."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers

from winnow.infra.errors import UsageError
from winnow.infra.registry import unknown

UNET, CONDITIONAL, AUTOENCODER = "UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"
# Of open_clip's TextTransformer.
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
# What follows from the objective.
_OURS = (
    "in_channels", "out_channels", "center_input_sample", "class_embed_type", "num_class_embeds",
    "num_train_timesteps", "cross_attention_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
)  # fmt: skip


@functools.cache
def arguments(name: str) -> dict[str, Any]:
    """The arguments of one of diffusers' networks, with their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


def check_networks(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe's networks: `unet`, with `text` when captions are the condition, or `autoencoder`.

    Each is a dict of the arguments of diffusers' UNet2DModel (with `text`, UNet2DConditionModel) or AutoencoderKL, or
    of open_clip's TextTransformer; `sample_size`, the side in pixels (of what the U-Net sees: of the latents, in latent
    diffusion), must be among them.

    Raises:
        UsageError: a key that is not known, or numbers that do not go together.
    """
    if "autoencoder" in config:
        _check(AUTOENCODER, config["autoencoder"], "autoencoder")
    else:
        _check(CONDITIONAL if "text" in config else UNET, config["unet"], "unet")
        for key in config.get("text", {}):
            if key not in TEXT:
                raise unknown("key of text", key, TEXT)
    return config


def _check(name: str, given: dict[str, Any], where: str) -> None:
    known = arguments(name)
    for key in given:
        if key in _OURS:
            raise UsageError(f"{where} must leave {key} alone, which is set for you")
        if key not in known:
            raise unknown(f"key of {where} (diffusers' {name})", key, set(known) - set(_OURS))
    size = given.get("sample_size")
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"{where} needs sample_size, the side of what it sees in pixels")
    full = known | given
    channels = full["block_out_channels"]
    if not isinstance(channels, list | tuple) or not all(isinstance(c, int) and c > 0 for c in channels or [0]):
        raise UsageError(f"{where}: block_out_channels must be a list of whole numbers")
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(full[key], list | tuple) or len(full[key]) != len(channels):
            raise UsageError(f"{where}: {key} must have one entry for each of the {len(channels)} block_out_channels")
    groups = full["norm_num_groups"] or 1
    if any(count % groups for count in channels):
        raise UsageError(f"{where}: block_out_channels {list(channels)} must be multiples of norm_num_groups, {groups}")
    if size % 2 ** (len(channels) - 1):
        raise UsageError(f"{where}: sample_size {size} cannot be halved {len(channels) - 1} times, between the blocks")
