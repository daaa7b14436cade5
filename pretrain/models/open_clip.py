"""open_clip's models: their names, configs and published weights, and networks built from a config."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg

from winnow.infra.errors import UsageError
from winnow.infra.registry import closest_word, unknown

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
    return config


def pretrained_tags(name: str) -> list[str]:
    """Tags with published weights for a model."""
    tags: list[str] = open_clip.list_pretrained_tags_by_model(name)
    return tags


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
    """A randomly initialised open_clip model (float32, CPU), drawn from torch's global generator.

    Args:
        config: open_clip's model config dict.
        preprocess: open_clip's preprocess_cfg; its defaults where None.

    Raises:
        UsageError: open_clip refuses the config.
    """
    # open_clip takes a config dict only from a file; a temporary folder leaves its global table of models unchanged.
    with tempfile.TemporaryDirectory() as folder, quiet():
        content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(content))
        try:
            model: torch.nn.Module = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False
            )
        except BUILD_ERRORS as error:
            raise UsageError(f"open_clip cannot build the model: {error}", where="model") from error
    return model
