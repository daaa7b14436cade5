"""open_clip's model names, configs and pretrained tags, and timm's names and arguments, read from their folders
without importing them or torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from winnow.infra.errors import UsageError
from winnow.infra.registry import closest_word, unknown

_PREPROCESS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")
# timm's families that may be an encoder: the file, and the class whose arguments a config may set.
_TIMM_FAMILIES = {"resnet": "ResNet", "vision_transformer": "VisionTransformer"}
_TIMM_OURS = ("num_classes", "in_chans", "img_size", "device", "dtype")


@functools.cache
def _package(name: str = "open_clip", pip: str = "open_clip_torch") -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UsageError(f"{name} is not installed", do=f"pip install {pip}")
    return Path(spec.origin).parent


@functools.cache
def model_names() -> list[str]:
    """Names of the models open_clip knows."""
    return sorted(path.stem for path in (_package() / "model_configs").glob("*.json"))


def model_config(name: str) -> dict[str, Any]:
    """open_clip's config of a model by name. Raises UsageError with the nearest name."""
    if name not in model_names():
        raise unknown("open_clip model", name, model_names())
    config: dict[str, Any] = json.loads((_package() / "model_configs" / f"{name}.json").read_text())
    return config


def check_config(config: Any, where: str | None = None) -> dict[str, Any]:
    """A model config, out of `{"model_cfg": …}` if it is wrapped. Raises UsageError when it is not one."""
    if isinstance(config, dict) and "model_cfg" in config:
        config = config["model_cfg"]
    missing = [key for key in _NEEDED if not isinstance(config, dict) or key not in config]
    if missing:
        raise UsageError(f"is no open_clip model config: {', '.join(missing)} missing", where=where)
    assert isinstance(config, dict)
    return config


def check_preprocess(config: Any, where: str | None = None) -> dict[str, Any]:
    """An open_clip preprocess_cfg, {} for None. Raises UsageError for a key that open_clip would silently ignore."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError("preprocess_cfg should be an object", where=where)
    for key, value in config.items():
        if key not in _PREPROCESS:
            raise unknown("key of preprocess_cfg", key, _PREPROCESS, where)
        if key in ("mean", "std") and not (isinstance(value, list | tuple) and len(value) == 3):
            raise UsageError(f"preprocess_cfg: {key} should be three numbers, one a channel", where=where)
    return config


@functools.cache
def pretrained_tags(name: str) -> dict[str, bool]:
    """Tags with published weights for a model, each with whether it was trained with QuickGELU.

    Read from the syntax tree of open_clip's table: its module imports torch, and a recipe with a misspelt tag should
    be refused before that takes its seconds.
    """
    groups: dict[str, dict[str, bool]] = {}
    table: dict[str, str] = {}
    for node in ast.parse((_package() / "pretrained.py").read_text()).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        target, value = node.targets[0].id, node.value
        if target == "_PRETRAINED" and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    if isinstance(entry, ast.Name):
                        table[str(key.value)] = entry.id
                    else:
                        table[str(key.value)] = str(key.value)
                        groups[str(key.value)] = _tags(entry)
        else:
            groups.setdefault(target, _tags(value))
    plain = name.removesuffix("-quickgelu")
    tags = groups.get(table.get(name, ""), {})
    if plain != name and not tags:
        tags = {tag: quick for tag, quick in groups.get(table.get(plain, ""), {}).items() if quick}
    return tags


def _tags(node: ast.expr) -> dict[str, bool]:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"):
        return {}
    tags = {}
    for item in node.keywords:
        if item.arg and isinstance(item.value, ast.Call):
            settings = {keyword.arg: keyword.value for keyword in item.value.keywords}
            quick = settings.get("quick_gelu")
            tags[item.arg] = isinstance(quick, ast.Constant) and quick.value is True
    return tags


def find_tag(name: str, tag: str) -> str:
    """The tag as open_clip spells it. Raises UsageError with the nearest one."""
    tags = pretrained_tags(name)
    clean = tag.lower().replace("-", "_")
    if clean in tags:
        return clean
    near = closest_word(clean, tags)
    hint = f'Did you mean "{name}:{near}"?' if near else f"Known: {', '.join(sorted(tags)) or 'none'}."
    raise UsageError(
        f'"{tag}" is neither a pretrained tag of {name} nor a file', do=f"{hint} A file with weights will do as well."
    )


@functools.cache
def timm_names() -> dict[str, str]:
    """timm's ResNets and ViTs, each with its family (the file of `timm.models` that makes it)."""
    names: dict[str, str] = {}
    for family in _TIMM_FAMILIES:
        text = (_package("timm", "timm") / "models" / f"{family}.py").read_text()
        names |= dict.fromkeys(re.findall(r"^@register_model\ndef (\w+)\(", text, re.MULTILINE), family)
    return names


@functools.cache
def timm_arguments(family: str) -> set[str]:
    """What the networks of a family may be given, from the signature of their class."""
    tree = ast.parse((_package("timm", "timm") / "models" / f"{family}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == _TIMM_FAMILIES[family]:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return {argument.arg for argument in item.args.args} - {"self"}
    return set()


def check_timm(name: str, size: int, stem: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config of a timm network that reads images, as `nets.build_image_tower` takes it.

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
        if key in _TIMM_OURS:
            raise UsageError(f"kwargs of {name} must leave {key} alone, which is set for you")
        if key not in timm_arguments(family):
            raise unknown(f"argument of {name}", key, timm_arguments(family) - set(_TIMM_OURS))
        if key == "global_pool" and not value:
            raise UsageError(f"kwargs of {name} must not switch off global_pool: an encoder gives one vector an image")
    return {"timm": name, "size": size, "stem": stem, "kwargs": kwargs}
