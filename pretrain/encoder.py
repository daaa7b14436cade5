"""The one door to a model: whatever made it, it comes out as an `Encoder`."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.registry import unknown
from winnow.pretrain.models.catalog import check_config, check_preprocess, model_config, pretrained_tags
from winnow.pretrain.models.spec import RANDOM, Spec, encoder_digest, is_winnow, parse_spec

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Encoder", "encoder_digest", "load_encoder", "load_encoders", "load_sampler", "parse_spec"]

_CACHED = 2
_cache: dict[tuple[str, str, str], Encoder] = {}
PRECISIONS = ("auto", "float32", "bfloat16")


def load_encoder(spec: str, device: str = "auto", threads: int | None = None, precision: str = "auto") -> Encoder:
    """Load an encoder; the last two loaded in a process are kept, for workers that are handed unit after unit.

    Args:
        spec: see `parse_spec`. Weights are read as safetensors or with `weights_only`, never executed.
        device: auto (CUDA where there is), cpu, cuda, cuda:1.
        threads: CPU threads torch computes with in this process; None leaves them.
        precision: of the matrix products: float32; bfloat16 (autocast); auto is bfloat16 on a GPU that has it.

    Raises:
        UsageError: the spec names nothing, or there is no such precision.
        WinnowError: the weights do not fit, are damaged, or cannot be downloaded.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if fast else "float32"
    key = (encoder_digest(spec), device, precision)
    if key in _cache:
        _cache[key] = _cache.pop(key)
        return _cache[key]
    model, tokenizer = _load(parse_spec(spec))
    encoder = _cache[key] = Encoder(spec, key[0], model, tokenizer, device, precision)
    while len(_cache) > _CACHED:
        del _cache[next(iter(_cache))]
    return encoder


# The encoders that `load_encoders` was last asked for in this process: the next call mostly wants the same.
_together: dict[tuple[str, str, str, str], Encoder] = {}


def load_encoders(
    wanted: Sequence[tuple[str, str]], device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> list[Encoder | WinnowError]:
    """The encoder of each (spec, digest), or the error that says why it cannot be loaded.

    Those asked for last stay in memory, so a process needs memory for all that are used together.

    Raises:
        UsageError: a spec names nothing.
    """
    keys = [(spec, digest, device, precision) for spec, digest in wanted]
    for key in set(_together) - set(keys):
        del _together[key]
    found: list[Encoder | WinnowError] = []
    for key in keys:
        if key not in _together:
            try:
                _together[key] = load_encoder(key[0], device=device, threads=threads, precision=precision)
            except UsageError:
                raise
            except WinnowError as error:
                found.append(error)
                continue
        found.append(_together[key])
    return found


def load_sampler(spec: str) -> Callable[..., np.ndarray]:
    """A function that draws images from a diffusion checkpoint: number of images to uint8 [n, 3, H, W].

    Its keyword arguments are those of `winnow.pretrain.diffusion.sampling.sample`. It raises UsageError where the
    checkpoint draws no images.
    """
    from winnow.pretrain.diffusion.sampling import sample

    return functools.partial(sample, spec)


def load_checkpoint(url: str) -> torch.nn.Module:
    """The network of a checkpoint folder as its objective's `build_encoder` makes it; on the CPU, frozen.

    Raises as `load_encoder`.
    """
    spec = parse_spec(url)
    if spec.kind != "folder" or spec.weights:
        raise UsageError("is no checkpoint folder", where=url)
    model: torch.nn.Module = _load(spec)[0]
    return model.eval().requires_grad_(False)


def _load(spec: Spec) -> tuple[Any, Any]:
    """The model and its tokenizer (None when it reads no text)."""
    import open_clip
    import torch

    from winnow.pretrain.models.nets import Pixels, build_model, build_tokenizer, quiet

    try:
        if spec.kind == "pixels":
            return Pixels(int(spec.model)), None
        if spec.kind == "folder":
            with _local(spec.model, folder=True) as folder, torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _load_folder(folder, bool(spec.weights))
        if spec.kind == "config":
            content = storage.read_json(spec.model)
            config = check_config(content, spec.model)
            preprocess = check_preprocess(content.get("preprocess_cfg"), spec.model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    model = build_model(config, preprocess)
                except UsageError as error:
                    raise UsageError(error.what, where=spec.model) from error
            if spec.is_file:
                with _local(spec.weights) as path:
                    open_clip.load_checkpoint(model, str(path))
            return model, build_tokenizer(config)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            if spec.weights == RANDOM:
                model = open_clip.create_model(spec.model, pretrained_text=False)
            elif spec.is_file:
                with _local(spec.weights) as path:
                    model = open_clip.create_model(spec.model, pretrained=str(path))
            else:
                # open_clip only warns when a tag was trained with another activation than the model's name implies.
                quick = pretrained_tags(spec.model)[spec.weights]
                model = open_clip.create_model(spec.model, pretrained=spec.weights, force_quick_gelu=quick)
        return model, build_tokenizer(model_config(spec.model), spec.model)
    except WinnowError:
        raise
    except Exception as error:  # whatever a library raises on a file that is not what it should be, or on no network
        raise WinnowError(
            f"cannot be loaded ({_message(error)})",
            where=spec.text,
            do="Published weights are downloaded once; without a network give a local file, as NAME:FILE."
            if spec.kind == "name" and not spec.is_file
            else "The weights must be a state dict that fits the model.",
        ) from error


def _message(error: Exception) -> str:
    """What a library said, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or it holds more than tensors, and none of that is executed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(lines[:3])[:300]}"


def _load_folder(folder: Path, random: bool) -> tuple[Any, Any]:
    import open_clip
    from safetensors.torch import load_file

    from winnow.pretrain.models.nets import build_tokenizer, quiet
    from winnow.pretrain.objectives import OBJECTIVES

    if is_winnow(str(folder)):
        content = json.loads((folder / "config.json").read_text())
        if isinstance(content, dict) and "objective" in content:
            cls = OBJECTIVES.load(content["objective"]["name"])
            model = cls.build_encoder(content["model"], content["preprocess"])
            if not random:
                model.load_state_dict(load_file(folder / "model.safetensors"))
            return model, build_tokenizer(content["model"]) if hasattr(model, "encode_text") else None
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


@contextlib.contextmanager
def _local(url: str, folder: bool = False) -> Iterator[Path]:
    """A local path of a file or of a checkpoint folder, fetched if need be."""
    if storage.is_local(url):
        yield storage.local_path(url)
        return
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        if not folder:
            target = target / storage.name_of(url)
            target.write_bytes(storage.read_bytes(url))
        else:
            for part in storage.list_names(url):
                if not storage.is_dir(storage.join(url, part)):
                    (target / part).write_bytes(storage.read_bytes(storage.join(url, part)))
        yield target


_token_caches: dict[str, Any] = {}


def _token_cache(tokenizer: Any) -> Any:
    """Tuples of texts to int64 [n, context], remembering the latest; the same for tokenizers that do the same."""
    from open_clip.tokenizer import SimpleTokenizer

    def tokens(texts: tuple[str, ...]) -> torch.Tensor:
        result: torch.Tensor = tokenizer(list(texts))
        return result

    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None:
        return tokens
    key = f"{_vocabulary(tokenizer)} {tokenizer.context_length} {tokenizer.clean_fn.__name__}"
    return _token_caches.setdefault(key, functools.lru_cache(maxsize=64)(tokens))


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any) -> str:
    return storage.digest_json(sorted(tokenizer.encoder.items()))


class Encoder:
    """Embeds images, and texts where the model reads them. For one caller at a time.

    Attributes:
        spec, digest: what was loaded, and its identity by content.
        dim: of the embeddings.
        has_text: whether `encode_texts` can be called.
        image_size: side of the preprocessed images, pixels.
        preprocess_key: equal for two encoders exactly when they preprocess images identically.
        logit_scale: what cosines are multiplied by; 1 where the model has none.
    """

    def __init__(
        self, spec: str, digest: str, model: Any, tokenizer: Any, device: str, precision: str = "float32"
    ) -> None:
        import torch

        from winnow.pretrain.models.nets import image_size, preprocess_config, val_steps

        self.spec, self.digest = spec, digest
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        # Encoders that are evaluated together are given the same texts one after the other.
        self._tokens: Any = _token_cache(tokenizer) if tokenizer is not None else None
        self._bf16 = precision == "bfloat16"
        config = preprocess_config(model)
        self.image_size = image_size(model)
        self.preprocess_key = hashlib.sha256(storage.canonical_json(config).encode()).hexdigest()
        self._crop, self._normalise = val_steps(config)
        self.has_text = tokenizer is not None and hasattr(model, "encode_text")
        scale = getattr(model, "logit_scale", None)
        self.logit_scale = float(scale.exp()) if scale is not None else 1.0
        blank = torch.zeros(1, 3, self.image_size, self.image_size)
        self.dim = self.encode_images(blank).shape[1]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """RGB image to float32 [3, H, W], as open_clip preprocesses for evaluation. Of many, `crop` each and
        `normalise` them together."""
        return self._normalise(self._crop(image)[None])[0]

    def crop(self, image: Image.Image) -> torch.Tensor:
        """RGB image to uint8 [3, H, W]: the first part of `preprocess`. May be called by several threads."""
        return self._crop(image)

    def normalise(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] to what `encode_images` takes, on the encoder's device: the rest of `preprocess`."""
        return self._normalise(crops.to(self._device))

    def encode_images(self, batch: torch.Tensor | np.ndarray) -> np.ndarray:
        """Preprocessed images, float32 [n, 3, H, W], to L2-normalised float32 [n, dim]."""
        import torch

        return self._run(lambda x: self._model.encode_image(x), torch.as_tensor(batch))

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> np.ndarray:
        """Texts to L2-normalised float32 [n, dim]. Raises UsageError when the model reads no text."""
        import torch

        if not self.has_text:
            raise UsageError("this encoder reads no text", where=self.spec)
        if not texts:
            return np.empty((0, self.dim), np.float32)
        tokens = torch.cat([self._tokens(tuple(texts[i : i + batch])) for i in range(0, len(texts), batch)])
        if not self._causal:
            return np.concatenate([self._run(self._model.encode_text, batch) for batch in tokens.split(batch)])
        order = tokens.argmax(dim=1).argsort(stable=True)
        parts = [self._run(self._encode_tokens, tokens[batch]) for batch in order.split(batch)]
        result = np.empty((len(texts), parts[0].shape[1]), np.float32)
        result[order.numpy()] = np.concatenate(parts)
        return result

    @property
    def _causal(self) -> bool:
        """Whether a text's feature is taken at its end and looks at nothing behind it, as CLIP's is."""
        import open_clip

        causal = isinstance(self._model, open_clip.CLIP) and self._model.attn_mask is not None
        return causal and self._model.text_pool_type == "argmax"

    def _encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """open_clip's `encode_text` of a causal model, without the padding after the longest text.

        That changes nothing, and prompts fill a fifth of CLIP's 77 places; texts of like length are put together.
        """
        import torch

        model = self._model
        length = int(tokens.argmax(dim=1).max()) + 1
        shorter = {
            "positional_embedding": model.positional_embedding[:length],
            "attn_mask": model.attn_mask[:length, :length],
        }
        output = torch.func.functional_call(model, shorter, (), {"text": tokens[:, :length]})
        return output["text_features"] if isinstance(output, dict) else output[1]

    def image_tower(self) -> torch.nn.Module:
        """A copy to fine-tune: preprocessed images, float32 [n, 3, H, W], to features [n, dim], not normalised.

        Its parameters ask for gradients; the encoder itself stays as it is. On the encoder's device, in evaluation
        mode.
        """
        from winnow.pretrain.models.nets import ImageEncoder

        return ImageEncoder(copy.deepcopy(self._model)).requires_grad_(True).eval()

    def _run(self, encode: Any, batch: torch.Tensor) -> np.ndarray:
        import torch

        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            features = encode(batch.to(self._device))
        features = torch.nn.functional.normalize(features.float(), dim=-1)
        result: np.ndarray = features.cpu().numpy()
        return result
