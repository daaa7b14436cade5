"""open_clip's models: their names, configs and published weights, and networks built from a config."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg

from winnow.infra.errors import UsageError
from winnow.infra.registry import closest_word, unknown

# Others are code or paths to transformers (trust_remote_code, cache_dir), or regular expressions.
TOKENIZER_KWARGS = ("clean", "strip_sep_token", "language")
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")
BUILD_ERRORS = (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError)  # of a wrong config


def model_config(name: str) -> dict[str, Any]:
    """open_clip's config of a model by name. Raises UsageError with the nearest name."""
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def check_config(config: Any, where: str | None = None) -> dict[str, Any]:
    """A model config, out of `{"model_cfg": …}` if it is wrapped. Raises UsageError when it is not one."""
    if isinstance(config, dict) and "model_cfg" in config:
        config = config["model_cfg"]
    missing = [key for key in _NEEDED if not isinstance(config, dict) or key not in config]
    if missing:
        raise UsageError(f"is not an open_clip model config: {', '.join(missing)} missing", where=where)
    assert isinstance(config, dict)
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(config[section], dict):
            raise UsageError(f"is not an open_clip model config: {section} is not an object", where=where)
    _check_names(config, where)
    return config


def _check_names(config: dict[str, Any], where: str | None) -> None:
    """Refuse what would make open_clip load from a hub or a path that a config names, or run code from there."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    network = vision.get("timm_model_name")
    if network is not None and not (isinstance(network, str) and ":" not in network and timm.is_model(network)):
        raise UsageError(f"names a network that timm does not have, {network!r}", where=where)
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key) and text[key] not in _hub_names(key):
            what = f"names {key} {text[key]!r}, which is none of those that open_clip's own models have"
            raise UsageError(what, where=where, do="Names in a config reach no network: give a model of open_clip's.")
    for key in text.get("tokenizer_kwargs") or {}:
        if key not in TOKENIZER_KWARGS:
            raise unknown("key of tokenizer_kwargs", str(key), TOKENIZER_KWARGS, where)


@functools.cache
def _hub_names(key: str) -> frozenset[str]:
    """The values that open_clip's own configs have of a key of text_cfg."""
    configs = (open_clip.get_model_config(name) for name in open_clip.list_models())
    return frozenset(config["text_cfg"].get(key) for config in configs) - {None}


def pretrained_tags(name: str) -> list[str]:
    """Tags with published weights for a model."""
    tags: list[str] = open_clip.list_pretrained_tags_by_model(name)
    return tags


@functools.cache
def agreed_preprocess(name: str) -> dict[str, Any]:
    """The part of a preprocess_cfg in which all published weights of a model agree and open_clip's default differs.

    It is for weights in a file, whose training is not known: mean and std 0.5 for SigLIP, say. {} where no weights are
    published, or they disagree; then the default, OpenAI's, stays.
    """
    default = vars(PreprocessCfg())
    published = [get_pretrained_cfg(name, tag) for tag in pretrained_tags(name)]
    agreed = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        values = {entry[key] for entry in published if key in entry}
        if len(values) == 1 and all(key in entry for entry in published) and values != {default[key]}:
            value = values.pop()
            agreed[key] = list(value) if isinstance(value, tuple) else value
    return agreed


def trained_with_quick_gelu(name: str, tag: str) -> bool:
    """Whether the weights want QuickGELU, whatever the model's name says. open_clip only warns of it."""
    return bool(get_pretrained_cfg(name, tag).get("quick_gelu"))


def find_tag(name: str, tag: str) -> str:
    """The tag as open_clip spells it. Raises UsageError with the nearest one."""
    tags = pretrained_tags(name)
    clean = tag.lower().replace("-", "_")
    if clean in tags:
        return clean
    near, what = closest_word(clean, tags), f'"{tag}" is neither a pretrained tag of {name} nor a file'
    hint = f'Did you mean "{name}:{near}"?' if near else f"Known: {', '.join(sorted(tags)) or 'none'}."
    raise UsageError(what, do=f"{hint} A file with weights will do as well.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without open_clip's warning that a model is initialised randomly."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def build_model(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> torch.nn.Module:
    """A randomly initialised open_clip model (float32, on torch's default device), drawn from torch's global generator.

    Args:
        config: open_clip's model config dict.
        preprocess: open_clip's preprocess_cfg; its defaults where None.

    Raises:
        UsageError: open_clip refuses the config.
    """
    check_config(config, "model")
    # open_clip takes a config dict only from a file; a temporary folder leaves its global table of models unchanged.
    with tempfile.TemporaryDirectory() as folder, quiet():
        content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(content))
        try:
            model: torch.nn.Module = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=torch.get_default_device()
            )
        except BUILD_ERRORS as error:
            raise UsageError(f"open_clip cannot build the model: {error}", where="model") from error
    return model
