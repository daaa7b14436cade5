"""Encoder specs: parsing, and the identity of an encoder by content."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import digest_json
from winnow.infra.stages.kept import check_kept

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
        """Whether `weights` is a file; a tag has neither a slash nor a file of its name."""
        return self.kind in ("name", "config") and self.weights != RANDOM and storage.exists(self.weights)


def parse_spec(spec: str) -> Spec:
    """Parse an encoder spec. Reads no weights; imports open_clip (and so torch) for its names and tags alone.

    A folder (a winnow checkpoint, or open_clip's own layout), `NAME:TAG` and `NAME:FILE` for open_clip's models,
    `CONFIG.json:FILE`. `random` after the colon, also after a winnow checkpoint's folder, means randomly initialised
    weights. The features of `pixels:SIZE` are the pixels themselves.

    Raises:
        UsageError: there is no such folder, file, model or tag; with the nearest one.
    """
    if not spec.strip():
        raise UsageError("the name of a checkpoint is empty", do=FORMS)
    if storage.is_dir(spec):
        if not storage.exists(storage.join(spec, "open_clip_config.json")) and not is_winnow(spec):
            raise UsageError("holds no checkpoint", where=spec, do=f"A checkpoint has {', '.join(_CHECKPOINT)}.")
        return Spec(spec, spec, "folder")
    if match := re.fullmatch(r"pixels:([1-9]\d{0,3})", spec):
        return Spec(spec, match[1], "pixels")
    match = re.fullmatch(r"((?:[a-z0-9+]+://)?[^:]+):(.*)", spec, re.DOTALL)
    if match is None:
        raise _without_weights(spec)
    model, weights = match[1], match[2]
    if weights == RANDOM and storage.is_dir(model):
        if not is_winnow(model):
            raise UsageError("holds no checkpoint of winnow's to take the networks of", where=model)
        return Spec(spec, model, "folder", RANDOM)
    return Spec(spec, model, _kind(spec, model), _weights(model, weights))


def _without_weights(spec: str) -> UsageError:
    """The error for a spec without a colon that is not a folder."""
    if storage.exists(spec):
        return UsageError("is a file, and a checkpoint is a folder or a model with its weights", where=spec, do=FORMS)
    if "/" not in spec:
        from open_clip import list_models

        from winnow.pretrain.models.open_clip import pretrained_tags

        if spec in list_models():
            tags = ", ".join(sorted(pretrained_tags(spec))) or "none"
            return UsageError(
                f'"{spec}" says no weights', do=f"Give {spec}:TAG (known: {tags}), {spec}:FILE or {spec}:random."
            )
    return UsageError("no such checkpoint folder", where=spec)


def _kind(spec: str, model: str) -> Literal["name", "config"]:
    if model.endswith(".json"):
        if not storage.exists(model):
            raise UsageError("no such model config", where=model)
        return "config"
    if model == "pixels":
        raise UsageError(f'"{spec}" has no size: pixels:SIZE, from 1 to 9999')
    if "/" in model:
        raise UsageError("no such checkpoint", where=spec, do=FORMS)
    from winnow.pretrain.models.open_clip import model_config

    model_config(model)
    return "name"


def _weights(model: str, weights: str) -> str:
    """A file, a tag of the model, or "random"."""
    config = model.endswith(".json")
    if weights == RANDOM or (config and not weights):
        return RANDOM
    if weights and storage.is_dir(weights):
        raise UsageError("is a folder, and weights are a file", where=weights)
    if weights and storage.exists(weights):
        return weights
    if config:
        raise UsageError("no such file of weights", where=weights)
    if "/" in weights:
        raise UsageError(f"no such file of weights for {model}", where=weights)
    from winnow.pretrain.models.open_clip import find_tag

    return find_tag(model, weights)


def absolute(spec: str) -> str:
    """The spec with absolute paths, for processes that run in another directory."""
    parsed = parse_spec(spec)
    if parsed.kind == "pixels":
        return spec
    model = parsed.model if parsed.kind == "name" else storage.absolute(parsed.model)
    weights = storage.absolute(parsed.weights) if parsed.is_file else parsed.weights
    return f"{model}:{weights}" if weights else model


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
        names = [name for name in storage.list_names(parsed.model) if not name.endswith(".py")]
        parts = [name for name in names if name in _CHECKPOINT or name.startswith("open_clip_")]
        return digest_json({name: _file_digest(storage.join(parsed.model, name)) for name in parts})
    model = parsed.model
    if parsed.kind == "config":
        from winnow.pretrain.models.open_clip import check_config
        from winnow.pretrain.models.preprocessing import check_preprocess

        model = storage.read_json(parsed.model)
        check_config(model, parsed.model)
        check_preprocess(model.get("preprocess_cfg"), parsed.model)
    return digest_json([model, {"sha256": _file_digest(parsed.weights)} if parsed.is_file else parsed.weights])


def is_winnow(url: str) -> bool:
    return all(storage.exists(storage.join(url, name)) for name in _CHECKPOINT[:2])


def _file_digest(url: str) -> str:
    return content_digest(check_kept(url))
