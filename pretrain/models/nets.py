"""open_clip's and timm's networks, tokenizers and image preprocessing, built from a config."""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from winnow.infra.errors import UsageError
from winnow.pretrain.models.catalog import timm_arguments, timm_names

# Captions repeat (every epoch, and on the web); BPE of one takes about as long as decoding a thumbnail.
_TOKEN_CACHE = 1 << 17


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns that a model made to be trained is initialised randomly."""
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
    import open_clip

    # open_clip takes a config dict only from a file; a folder of its own keeps its global table of models as it is.
    with tempfile.TemporaryDirectory() as folder, quiet():
        content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(content))
        try:
            model: torch.nn.Module = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False
            )
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
            raise UsageError(f"open_clip cannot build the model: {error}", where="model") from error
    return model


class ImageTower(torch.nn.Module):
    """An encoder of images alone.

    Args:
        trunk: float [n, 3, H, W] to features [n, dim].
        preprocess: open_clip's preprocess_cfg.

    Attributes:
        dim: of the features.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, trunk: torch.nn.Module, dim: int, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.trunk, self.dim, self.preprocess_cfg = trunk, dim, preprocess
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] to features, [n, dim]."""
        return self.encode_image((pixels.float() / 255 - self.mean) / self.std)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images, float [n, 3, H, W], to features, [n, dim]."""
        # Convolutions are up to half as fast again with a place's channels side by side; the output inherits it.
        features: torch.Tensor = self.trunk(images.contiguous(memory_format=torch.channels_last))
        return features


def build_image_tower(model: dict[str, Any], preprocess: dict[str, Any] | None = None) -> ImageTower:
    """A randomly initialised image encoder (float32, CPU), drawn from torch's global generator.

    Of timm the pooled features before the classifier, with timm's mean, standard deviation and interpolation; of
    open_clip the image tower up to and with its projection.

    Args:
        model: as `ModelConfig.resolved` gives it.
        preprocess: open_clip's preprocess_cfg; the network's own where None.

    Raises:
        UsageError: the library refuses the config.
    """
    if "timm" not in model:
        if "multimodal_cfg" in model:
            raise UsageError("the image tower of a model with a text decoder (CoCa) cannot stand alone", where="model")
        whole = build_model(model, preprocess)
        return ImageTower(whole.visual, model["embed_dim"], preprocess_config(whole))  # type: ignore[arg-type]
    import timm

    size, kwargs = model["size"], dict(model["kwargs"])
    if "img_size" in timm_arguments(timm_names()[model["timm"]]):
        kwargs["img_size"] = size
    try:
        trunk: Any = timm.create_model(model["timm"], num_classes=0, **kwargs)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise UsageError(f"timm cannot build {model['timm']}: {error}", where="model") from error
    if model["stem"] == "cifar":
        width = trunk.bn1.num_features
        trunk.conv1 = torch.nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
        trunk.maxpool = torch.nn.Identity()
    settings = timm.data.resolve_model_data_config(trunk)
    settings = {name: list(settings[name]) for name in ("mean", "std")} | {"interpolation": settings["interpolation"]}
    defaults = {"size": [size, size], "mode": "RGB", "resize_mode": "shortest", "fill_color": 0}
    return ImageTower(trunk, trunk.head_hidden_size, preprocess or {**defaults, **settings})


class Pixels(torch.nn.Module):
    """No network: the features are the pixels, a baseline for what one learns.

    Args:
        size: side of the images.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.preprocess_cfg = {"size": (size, size), "mean": (0.0,) * 3, "std": (1.0,) * 3}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] to [n, 3·H·W]."""
        return images.flatten(1)


class ImageEncoder(torch.nn.Module):
    """A model's `encode_image` as its `forward`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.encode_image(images)
        return features


def preprocess_config(model: torch.nn.Module) -> dict[str, Any]:
    """open_clip's preprocess_cfg of a model: size, mean, std, interpolation, resize_mode, fill_color, mode."""
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def image_size(model: torch.nn.Module) -> int:
    """Side of the square images a model takes. Raises UsageError when they are not square."""
    size = preprocess_config(model)["size"]
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UsageError(f"images must be square, the model takes {size}", where="model")
    return int(size[0])


def val_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's own preprocessing for evaluation: RGB image to float32 [3, H, W]."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return transform


def val_steps(
    preprocess: dict[str, Any],
) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """`val_transform` in two steps that give the same bits: what is done with each image, and with a batch at once.

    The first gives uint8 [3, H, W], the second makes of uint8 [n, 3, H, W] float32 on the same device. One by one, that
    takes as long as decoding a thumbnail.
    """
    from torchvision.transforms import Compose, Normalize, ToTensor

    whole: Any = val_transform(preprocess)
    *first, to_tensor, normalize = whole.transforms
    if not isinstance(to_tensor, ToTensor) or not isinstance(normalize, Normalize):
        return whole, lambda batch: batch
    resized = Compose(first)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (normalize.mean, normalize.std))

    def crop(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(resized(image))).permute(2, 0, 1)

    def normalise(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().div_(255).sub_(mean.to(batch.device)).div_(std.to(batch.device))

    return crop, normalise


def build_tokenizer(config: dict[str, Any], name: str | None = None) -> Callable[[Sequence[str]], torch.Tensor]:
    """The tokenizer of a model: texts to int64 [n, context]; by open_clip's name where it has one.

    Equal ones are the same object: to build one takes as long as to load a small model.
    """
    text = config["text_cfg"]
    settings = {"name": text.get("hf_tokenizer_name"), "mode": text.get("tokenizer_mode")}
    settings |= {"context": text.get("context_length", 77), "kwargs": text.get("tokenizer_kwargs") or {}}
    return _tokenizer(name, json.dumps(settings, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str | None, settings: str) -> Callable[[Sequence[str]], torch.Tensor]:
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    config = json.loads(settings)
    if name is not None:
        tokenizer = open_clip.get_tokenizer(name)
    elif config["name"]:
        tokenizer = HFTokenizer(
            config["name"], context_length=config["context"], tokenizer_mode=config["mode"], **config["kwargs"]
        )
    else:
        tokenizer = SimpleTokenizer(context_length=config["context"], **config["kwargs"])
    return tokenizer


def caching_tokens(tokenizer: Callable[[Sequence[str]], torch.Tensor]) -> Callable[[str], np.ndarray]:
    """One caption to int32 [context], remembering the latest."""

    @functools.lru_cache(maxsize=_TOKEN_CACHE)
    def tokens(text: str) -> np.ndarray:
        result = tokenizer([text])[0].numpy().astype(np.int32)
        result.flags.writeable = False
        return result

    return tokens


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random crop of `scale` of the area and of aspect ratio 3/4 to 4/3, resized; uint8 [3, size, size].

    torchvision's RandomResizedCrop with bicubic interpolation, which open_clip trains with, but drawn from `rng`.
    Normalisation is left to the device, where a whole batch takes one operation.
    """
    width, height = image.size
    ratio = (math.log(3 / 4), math.log(4 / 3))
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:  # torchvision's fallback: the central crop of the nearest allowed aspect ratio
        w = min(width, max(1, round(height * 4 / 3)))
        h = min(height, max(1, round(width * 4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
