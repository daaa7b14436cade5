"""Loads networks and their tokenizers by encoder spec."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.kept import check_kept
from winnow.pretrain.checkpoint.weights import load_weights, read_safetensors, read_weights
from winnow.pretrain.models.open_clip import (
    agreed_preprocess,
    build_model,
    check_config,
    model_config,
    quiet,
    trained_with_quick_gelu,
)
from winnow.pretrain.models.preprocessing import check_preprocess, image_size
from winnow.pretrain.models.spec import RANDOM, Spec, is_winnow, parse_spec, read_config, weights_of
from winnow.pretrain.models.tokenizer import build_tokenizer
from winnow.pretrain.models.towers import Pixels
from winnow.pretrain.objectives import OBJECTIVES

# Of the network that a config in a file describes.
_MOST_LAYERS, _LARGEST_IMAGE, _MOST_WEIGHTS, _FEW_WEIGHTS = 10_000, 4096, 1 << 34, 1 << 26
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
            content = read_config(str(folder / "config.json"))
            if isinstance(content, dict) and "objective" in content:
                return _of_winnow(content, folder, spec)
        config = read_config(str(folder / "open_clip_config.json"))
        file = weights_of(str(folder))
        if file is None:
            raise WinnowError("holds no weights", where=spec.text, do="A checkpoint has model.safetensors.")
        loaded = _built(config, folder / file, spec.text, folder)
    return loaded


def _of_winnow(content: dict[str, Any], folder: Path, spec: Spec) -> Loaded:
    name = content["objective"]["name"]
    OBJECTIVES.check_data(name, spec.text)
    build = OBJECTIVES.load(name).build_encoder
    file = folder / "model.safetensors"
    preprocess = check_preprocess(content["preprocess"], spec.text)
    state = None if spec.weights == RANDOM else read_safetensors(file, spec.text)
    model = _bounded(lambda: build(content["model"], preprocess), content["model"], file, spec.text)
    if state is not None:
        model.load_state_dict(state)
    return model, build_tokenizer(content["model"]) if hasattr(model, "encode_text") else None


def _config(spec: Spec) -> Loaded:
    content = read_config(spec.model)
    if not spec.is_file:
        return _built(content, None, spec.model)
    with local_copy(spec.weights) as path:
        return _built(content, path, spec.text)


def _built(content: Any, weights: Path | None, where: str, folder: Path | None = None) -> Loaded:
    """The network of a config with weights of a file, and its tokenizer, which a folder of open_clip's may hold."""
    config = check_config(content, where)
    preprocess = check_preprocess(content.get("preprocess_cfg"), where)
    state = None if weights is None else read_weights(weights, where)
    try:
        model = _bounded(lambda: build_model(config, preprocess), config, weights, where)
    except UsageError as error:
        raise UsageError(error.what, where=where, do=error.do) from error
    if state is not None:
        load_weights(model, state, where)
    return model, build_tokenizer(config, folder=folder)


def _name(spec: Spec) -> Loaded:
    if spec.is_file:
        model = build_model(model_config(spec.model), agreed_preprocess(spec.model))
        with local_copy(spec.weights) as path:
            load_weights(model, read_weights(path, spec.text), spec.text)
        return model, build_tokenizer(model_config(spec.model), spec.model)
    with quiet():
        if spec.weights == RANDOM:
            model = open_clip.create_model(spec.model, pretrained_text=False)
        else:
            quick = trained_with_quick_gelu(spec.model, spec.weights)
            model = open_clip.create_model(spec.model, pretrained=spec.weights, force_quick_gelu=quick)
    return model, build_tokenizer(model_config(spec.model), spec.model)


def _bounded(build: Callable[[], Any], config: Any, weights: Path | None, where: str) -> Any:
    """The network of a config in a file, whose numbers might ask for any amount of memory.

    It is built without memory first: a network with more weights than its file has bytes is another one.
    """
    if _deepest(config) > _MOST_LAYERS:
        raise WinnowError(f"its config describes more than {_MOST_LAYERS:,} layers", where=where)
    count = 0
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
        count = sum(weight.numel() for weight in build().parameters())
    if count > (_MOST_WEIGHTS if weights is None else max(weights.stat().st_size, _FEW_WEIGHTS)):
        raise WinnowError(f"its config describes {count:,} weights, more than its file can hold", where=where)
    model = build()
    if (size := image_size(model)) > _LARGEST_IMAGE:
        raise WinnowError(f"its config describes images of {size:,} pixels a side", where=where)
    return model


def _deepest(config: Any) -> int:
    """The largest number of layers in a config."""
    if isinstance(config, dict):
        own = [value for key, value in config.items() if key in ("layers", "depth", "layers_per_block")]
        numbers = [n for value in own for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        return max([0, *numbers, *map(_deepest, config.values())])
    return max(map(_deepest, config), default=0) if isinstance(config, list) else 0


def _message(error: Exception) -> str:
    """What a library said, in one line."""
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
