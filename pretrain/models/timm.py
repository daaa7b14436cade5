"""timm's ResNets and ViTs: their names and arguments, and networks built from a config."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import timm
import torch

from winnow.infra.errors import UsageError
from winnow.infra.registry import unknown
from winnow.pretrain.models.open_clip import BUILD_ERRORS

# Families that can be an encoder: the module of timm, and the class whose arguments a config may set.
_FAMILIES = {"resnet": timm.models.ResNet, "vision_transformer": timm.models.VisionTransformer}
_OURS = ("num_classes", "in_chans", "img_size", "device", "dtype")


@functools.cache
def timm_names() -> dict[str, str]:
    """Names of timm's ResNets and ViTs, each with its family."""
    return {name: family for family in _FAMILIES for name in timm.list_models(module=family)}


@functools.cache
def timm_arguments(family: str) -> frozenset[str]:
    """The arguments of a family's class."""
    parameters = inspect.signature(_FAMILIES[family]).parameters.values()
    return frozenset(item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD)


def check_timm(name: str, size: int, stem: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config of a timm network that reads images, as `towers.build_image_tower` takes it.

    Args:
        name: timm's.
        size: side of the images, pixels.
        stem: "imagenet" leaves the network as it is; "cifar", for ResNets, is a 3x3 convolution of stride 1 and no
            max-pool.
        kwargs: arguments of timm's class.

    Raises:
        UsageError: timm has no such network or argument, or the network has no such stem.
    """
    if name not in timm_names():
        raise unknown("timm ResNet or ViT", name, timm_names())
    family = timm_names()[name]
    if stem == "cifar" and family != "resnet":
        raise UsageError(f"stem cifar is of ResNets, {name} has no convolutional stem", do="Leave out stem.")
    for key, value in kwargs.items():
        if key in _OURS:
            raise UsageError(f"kwargs of {name} must leave {key} alone, which is set for you")
        if key not in timm_arguments(family):
            raise unknown(f"argument of {name}", key, timm_arguments(family) - set(_OURS))
        if key == "global_pool" and not value:
            raise UsageError(f"kwargs of {name} must not switch off global_pool: an encoder gives one vector per image")
    return {"timm": name, "size": size, "stem": stem, "kwargs": kwargs}


def build_trunk(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A randomly initialised network without classifier, and open_clip's preprocess_cfg with timm's values.

    Args:
        config: as `check_timm` returns it.

    Raises:
        UsageError: timm refuses the config.
    """
    name, size, kwargs = config["timm"], config["size"], dict(config["kwargs"])
    check_timm(name, size, config["stem"], kwargs)  # a checkpoint's config may hold anything
    if "img_size" in timm_arguments(timm_names()[name]):
        kwargs["img_size"] = size
    try:
        trunk: Any = timm.create_model(name, num_classes=0, **kwargs)
    except BUILD_ERRORS as error:
        raise UsageError(f"timm cannot build {name}: {error}", where="model") from error
    if config["stem"] == "cifar":
        width = trunk.bn1.num_features
        trunk.conv1 = torch.nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
        trunk.maxpool = torch.nn.Identity()
    settings = timm.data.resolve_model_data_config(trunk)
    preprocess = {"size": [size, size], "mode": "RGB", "resize_mode": "shortest", "fill_color": 0}
    preprocess |= {name: list(settings[name]) for name in ("mean", "std")}
    return trunk, preprocess | {"interpolation": settings["interpolation"]}
