"""What an encoder spec stands for, and its identity by content; imports no torch."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.storage import digest_json
from winnow.pretrain.models.catalog import (
    check_config,
    check_preprocess,
    find_tag,
    model_config,
    model_names,
    pretrained_tags,
)

_CHECKPOINT = ("model.safetensors", "config.json", "open_clip_config.json")
RANDOM = "random"
FORMS = "Give a folder, NAME:TAG, NAME:FILE or CONFIG.json:WEIGHTS."


@dataclass(frozen=True)
class Spec:
    """A parsed encoder spec.

    Attributes:
        text: as it was given.
        model: open_clip model name, URL of a config json, URL of a checkpoint folder, or side of the images.
        kind: what `model` is.
        weights: pretrained tag, "random", or URL of a file; empty for a folder's own.
    """

    text: str
    model: str
    kind: Literal["name", "config", "folder", "pixels"]
    weights: str = ""

    @property
    def is_file(self) -> bool:
        """Whether `weights` is a file."""
        tag = self.kind == "name" and self.weights in pretrained_tags(self.model)
        return self.kind in ("name", "config") and self.weights != RANDOM and not tag


def parse_spec(spec: str) -> Spec:
    """What a spec stands for; reads no weights and imports no torch.

    A folder (a winnow checkpoint, or open_clip's own layout), `NAME:TAG` and `NAME:FILE` for open_clip's models,
    `CONFIG.json:FILE`; `random` after the colon, also after a winnow checkpoint's folder, draws the weights anew. And
    `pixels:SIZE`, whose features are the pixels themselves.

    Raises:
        UsageError: there is no such folder, file, model or tag; with the nearest one.
    """
    if not spec.strip():
        raise UsageError("a checkpoint is named by nothing", do=FORMS)
    if storage.is_dir(spec):
        if not storage.exists(storage.join(spec, "open_clip_config.json")) and not is_winnow(spec):
            raise UsageError("holds no checkpoint", where=spec, do=f"A checkpoint has {', '.join(_CHECKPOINT)}.")
        return Spec(spec, spec, "folder")
    if match := re.fullmatch(r"pixels:([1-9]\d{0,3})", spec):
        return Spec(spec, match[1], "pixels")
    match = re.fullmatch(r"((?:[a-z0-9+]+://)?[^:]+):(.*)", spec, re.DOTALL)
    if match is None:
        if spec in model_names():
            tags = ", ".join(sorted(pretrained_tags(spec))) or "none"
            raise UsageError(
                f'"{spec}" says no weights', do=f"Give {spec}:TAG (known: {tags}), {spec}:FILE or {spec}:random."
            )
        if storage.exists(spec):
            raise UsageError(
                "is a file, and a checkpoint is a folder or a model with its weights", where=spec, do=FORMS
            )
        raise UsageError("no such checkpoint folder", where=spec)
    model, weights = match[1], match[2]
    if weights == RANDOM and storage.is_dir(model):
        if not is_winnow(model):
            raise UsageError("holds no checkpoint of winnow's to take the networks of", where=model)
        return Spec(spec, model, "folder", RANDOM)
    if model.endswith(".json"):
        if not storage.exists(model):
            raise UsageError("no such model config", where=model)
        kind: Literal["name", "config"] = "config"
    elif model == "pixels":
        raise UsageError(f'"{spec}" has no size: pixels:SIZE, from 1 to 9999')
    elif "/" in model:
        raise UsageError("no such checkpoint", where=spec, do=FORMS)
    else:
        model_config(model)
        kind = "name"
    if weights == RANDOM or (kind == "config" and not weights):
        return Spec(spec, model, kind, RANDOM)
    if weights and storage.is_dir(weights):
        raise UsageError("is a folder, and weights are a file", where=weights)
    if weights and storage.exists(weights):
        return Spec(spec, model, kind, weights)
    if kind == "config":
        raise UsageError("no such file of weights", where=weights)
    if "/" in weights:
        raise UsageError(f"no such file of weights for {model}", where=weights)
    return Spec(spec, model, kind, find_tag(model, weights))


def encoder_digest(spec: str) -> str:
    """What an encoder is, by content: sha256 over its weights and configs, or over name and tag for published ones.

    Raises UsageError as `parse_spec`.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "pixels":
        return digest_json(["pixels", parsed.model])
    if parsed.kind == "folder" and parsed.weights == RANDOM:
        return digest_json([_file_digest(storage.join(parsed.model, "config.json")), RANDOM])
    if parsed.kind == "folder":
        names = [name for name in storage.list_names(parsed.model) if _is_part(name)]
        return digest_json({name: _file_digest(storage.join(parsed.model, name)) for name in names})
    model = parsed.model
    if parsed.kind == "config":
        model = storage.read_json(parsed.model)
        check_config(model, parsed.model)
        check_preprocess(model.get("preprocess_cfg"), parsed.model)
    return digest_json([model, {"sha256": _file_digest(parsed.weights)} if parsed.is_file else parsed.weights])


def _is_part(name: str) -> bool:
    return name in _CHECKPOINT or (name.startswith("open_clip_") and not name.endswith(".py"))


def is_winnow(url: str) -> bool:
    return all(storage.exists(storage.join(url, name)) for name in _CHECKPOINT[:2])


def _file_digest(url: str) -> str:
    return _digest_of_version(url, storage.version_token(url))


@functools.lru_cache(maxsize=64)
def _digest_of_version(url: str, version: str) -> str:
    return storage.digest_file(url)
