"""Loads networks and their tokenizers by encoder spec."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.kept import check_kept
from winnow.pretrain.models.open_clip import build_model, check_config, model_config, quiet, trained_with_quick_gelu
from winnow.pretrain.models.preprocessing import check_preprocess
from winnow.pretrain.models.spec import RANDOM, Spec, is_winnow, parse_spec
from winnow.pretrain.models.tokenizer import build_tokenizer
from winnow.pretrain.models.towers import Pixels
from winnow.pretrain.objectives import OBJECTIVES

Loaded = tuple[Any, Any]  # the network, and its tokenizer (None when it reads no text)


def load_network(spec: Spec) -> Loaded:
    """The network of a spec on the CPU, and its tokenizer (None when it reads no text).

    Weights are read as safetensors or with `weights_only`, never executed. torch's global generator is left as it was.

    Raises:
        UsageError: the config of the network is wrong.
        WinnowError: the weights do not fit, are damaged, or cannot be downloaded.
    """
    load = {"pixels": _pixels, "folder": _folder, "config": _config, "name": _name}[spec.kind]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load(spec)
    except WinnowError:
        raise
    except Exception as error:  # whatever a library raises on a damaged file or without a network
        do = "The weights must be a state dict that fits the model."
        if spec.kind == "name" and not spec.is_file:
            do = "Published weights are downloaded once; without a network give a local file, as NAME:FILE."
        raise WinnowError(f"cannot be loaded ({_message(error)})", where=spec.text, do=do) from error


def load_checkpoint(url: str) -> torch.nn.Module:
    """The network of a checkpoint folder as its objective's `build_encoder` makes it; on the CPU, frozen.

    Raises as `load_network`.
    """
    spec = parse_spec(url)
    if spec.kind != "folder" or spec.weights:
        raise UsageError("is not a checkpoint folder", where=url)
    model: torch.nn.Module = load_network(spec)[0]
    return model.eval().requires_grad_(False)


def initial_weights(spec: str, encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of another encoder that fit an encoder to train, by the names of the latter.

    The image tower of open_clip's models is `visual` in the whole model and `trunk` alone.

    Args:
        spec: of the other encoder.
        encoder: to train.

    Raises:
        UsageError: nothing fits, or weights of the same name have other shapes.
    """
    found: dict[str, torch.Tensor] = load_network(parse_spec(spec))[0].state_dict()
    own = encoder.state_dict()
    fits: dict[str, torch.Tensor] = {}
    for there, here in (("", ""), ("visual.", "trunk."), ("trunk.", "visual.")):
        renamed = {here + name.removeprefix(there): value for name, value in found.items() if name.startswith(there)}
        fits = fits or {name: value for name, value in renamed.items() if name in own}
    if not fits:
        raise UsageError(f"{spec} has no weights of the networks that are trained", where="init")
    for name, value in fits.items():
        if value.squeeze().shape != own[name].squeeze().shape:
            raise UsageError(f"{name} of {spec} is {list(value.shape)}, and here {list(own[name].shape)}", where="init")
    return fits


def _pixels(spec: Spec) -> Loaded:
    return Pixels(int(spec.model)), None


def _folder(spec: Spec) -> Loaded:
    for name in storage.list_names(spec.model):
        check_kept(storage.join(spec.model, name))
    with local_copy(spec.model) as folder:
        if is_winnow(str(folder)):
            content = json.loads((folder / "config.json").read_text())
            if isinstance(content, dict) and "objective" in content:
                cls = OBJECTIVES.load(content["objective"]["name"])
                model = cls.build_encoder(content["model"], content["preprocess"])
                if spec.weights != RANDOM:
                    model.load_state_dict(load_file(folder / "model.safetensors"))
                return model, build_tokenizer(content["model"]) if hasattr(model, "encode_text") else None
        with quiet():
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        return model, open_clip.get_tokenizer(f"local-dir:{folder}")


def _config(spec: Spec) -> Loaded:
    content = storage.read_json(spec.model)
    config = check_config(content, spec.model)
    try:
        model = build_model(config, check_preprocess(content.get("preprocess_cfg"), spec.model))
    except UsageError as error:
        raise UsageError(error.what, where=spec.model) from error
    if spec.is_file:
        with local_copy(spec.weights) as path:
            open_clip.load_checkpoint(model, str(path))
    return model, build_tokenizer(config)


def _name(spec: Spec) -> Loaded:
    with quiet():
        if spec.weights == RANDOM:
            model = open_clip.create_model(spec.model, pretrained_text=False)
        elif spec.is_file:
            with local_copy(spec.weights) as path:
                model = open_clip.create_model(spec.model, pretrained=str(path))
        else:
            quick = trained_with_quick_gelu(spec.model, spec.weights)
            model = open_clip.create_model(spec.model, pretrained=spec.weights, force_quick_gelu=quick)
    return model, build_tokenizer(model_config(spec.model), spec.model)


def _message(error: Exception) -> str:
    """What a library said, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or it holds more than tensors, and none of that is executed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(lines[:3])[:300]}"


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A local path of a file or of the files of a folder, fetched if need be."""
    if storage.is_local(url):
        yield storage.local_path(url)
        return
    names = storage.list_names(url) if storage.is_dir(url) else []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        for part in [storage.join(url, name) for name in names] or [url]:
            if not storage.is_dir(part):
                with storage.open_read(part) as source, (target / storage.name_of(part)).open("wb") as file:
                    shutil.copyfileobj(source, file, 8 << 20)
        yield target if names else target / storage.name_of(url)
