"""The one door to a model: whatever made it, it comes out as an `Encoder`."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.registry import unknown
from winnow.pretrain.models.spec import encoder_digest, parse_spec

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "Encoder",
    "encoder_digest",
    "load_checkpoint",
    "load_encoder",
    "load_encoders",
    "load_sampler",
    "not_finite",
    "parse_spec",
]

PRECISIONS = ("auto", "float32", "bfloat16")
_KEPT = 2  # encoders loaded one by one
_cache: dict[tuple[str, str, str], Encoder] = {}


def load_encoder(spec: str, device: str = "auto", threads: int | None = None, precision: str = "float32") -> Encoder:
    """Load an encoder. A process keeps the last two, for workers that run one unit after the other.

    Args:
        spec: see `parse_spec`. Weights are read as safetensors or with `weights_only`, never executed.
        device: auto (CUDA where there is), cpu, cuda, cuda:1.
        threads: CPU threads torch computes with in this process; None leaves them.
        precision: of the matrix products: float32; bfloat16 (autocast); auto is bfloat16 on a GPU that has it.

    Raises:
        UsageError: the spec names nothing, or there is no such precision.
        WinnowError: the weights do not fit, are damaged, or cannot be downloaded.
    """
    encoder = _load(spec, encoder_digest(spec), device, threads, precision)
    while len(_cache) > _KEPT:
        del _cache[next(iter(_cache))]
    return encoder


def load_encoders(
    wanted: Sequence[tuple[str, str]], device: str = "auto", threads: int | None = None, precision: str = "float32"
) -> list[Encoder | WinnowError]:
    """Load several encoders, and keep just those: a process needs memory for all that are evaluated together.

    Args:
        wanted: (spec, digest) of each.
        device, threads, precision: as in `load_encoder`.

    Returns:
        The encoders, or the error of each that cannot be loaded, in order.

    Raises:
        UsageError: a spec names nothing, or there is no such precision.
    """
    digests = {digest for _, digest in wanted}
    for key in [key for key in _cache if key[0] not in digests]:
        del _cache[key]
    found: list[Encoder | WinnowError] = []
    for spec, digest in wanted:
        try:
            found.append(_load(spec, digest, device, threads, precision))
        except UsageError:
            raise
        except WinnowError as error:
            found.append(error)
    return found


def _load(spec: str, digest: str, device: str, threads: int | None, precision: str) -> Encoder:
    """Out of the cache, whose last entry it then is."""
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
    key = (digest, device, precision)
    if key in _cache:
        _cache[key] = _cache.pop(key)
        return _cache[key]
    from winnow.pretrain.checkpoint.load import load_network

    model, tokenizer = load_network(parse_spec(spec))
    encoder = _cache[key] = Encoder(spec, digest, model, tokenizer, device, precision)
    return encoder


def load_sampler(spec: str) -> Callable[..., np.ndarray]:
    """A function that draws images from a diffusion checkpoint: number of images to uint8 [n, 3, H, W].

    Its keyword arguments are those of `winnow.pretrain.diffusion.sampling.sample`. It raises UsageError where the
    checkpoint draws no images.
    """
    from winnow.pretrain.diffusion.sampling import sample

    return functools.partial(sample, spec)


def load_checkpoint(url: str) -> torch.nn.Module:
    """The network of a checkpoint folder as its objective makes it, on the CPU, frozen. Raises as `load_encoder`."""
    from winnow.pretrain.checkpoint import load

    return load.load_checkpoint(url)


def not_finite(**features: np.ndarray) -> str | None:
    """Why what is computed from features, float [n, dim], would be meaningless; None where they are finite."""
    for of, array in features.items():
        if wrong := int((~np.isfinite(array).all(axis=1)).sum()):
            return f"the encoder's features are not finite, for {wrong:,} of {len(array):,} {of}"
    return None


class Encoder:
    """Embeds images, and texts where the model reads them. For one caller at a time.

    Attributes:
        spec, digest: what was loaded, and its identity by content.
        dim: of the embeddings.
        reads: what it can embed: "image", "text", "audio".
        image_size: side of the preprocessed images, pixels.
        preprocess_key: equal for two encoders exactly when they preprocess images identically.
        logit_scale: what cosines are multiplied by; 1 where the model has none.
    """

    def __init__(
        self, spec: str, digest: str, model: Any, tokenizer: Any, device: str, precision: str = "float32"
    ) -> None:
        import torch

        from winnow.pretrain.models.preprocessing import image_size, preprocess_config, val_steps
        from winnow.pretrain.models.tokenizer import token_cache

        self.spec, self.digest = spec, digest
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        # Encoders that are evaluated together get the same texts one after the other.
        self._tokens: Any = token_cache(tokenizer) if tokenizer is not None else None
        self._bf16 = precision == "bfloat16"
        config = preprocess_config(model)
        self.image_size = image_size(model)
        self.preprocess_key = hashlib.sha256(storage.canonical_json(config).encode()).hexdigest()
        self._crop, self._normalise = val_steps(config)
        methods = {"image": "encode_image", "text": "encode_text", "audio": "encode_audio"}
        self.reads = frozenset(kind for kind, method in methods.items() if hasattr(model, method))
        if tokenizer is None:
            self.reads -= {"text"}
        scale = getattr(model, "logit_scale", None)
        self.logit_scale = float(scale.exp()) if scale is not None else 1.0
        blank = torch.zeros(1, 3, self.image_size, self.image_size)
        self.dim = self.encode_images(blank).shape[1]

    @property
    def has_text(self) -> bool:
        """Whether `encode_texts` can be called."""
        return "text" in self.reads

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """RGB image to float32 [3, H, W], as open_clip preprocesses for evaluation. For many images,
        `crop` each and `normalise` them together."""
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

    def feature_maps(self, images: torch.Tensor | np.ndarray) -> np.ndarray:
        """Features before they are pooled: preprocessed images, float32 [n, 3, H, W], to float32 [n, c, h, w].

        Of a ResNet the last stage's; of a ViT the last block's patch tokens on their grid; of an autoencoder the
        latents; of a diffusion model the middle block's.

        Raises:
            UsageError: the network has none.
        """
        import torch

        from winnow.pretrain.models.maps import feature_maps

        maps = self._infer(lambda x: feature_maps(self._model, x, self.spec), torch.as_tensor(images))
        result: np.ndarray = maps.float().cpu().numpy()
        return result

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> np.ndarray:
        """Texts to L2-normalised float32 [n, dim]. Raises UsageError when the model reads no text."""
        import torch

        if not self.has_text:
            raise UsageError("this encoder does not read text", where=self.spec)
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
        """Whether a text's feature is that of its last token and attends to nothing after it, as in CLIP."""
        import open_clip

        causal = isinstance(self._model, open_clip.CLIP) and self._model.attn_mask is not None
        return causal and self._model.text_pool_type == "argmax"

    def _encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """open_clip's `encode_text` of a causal model, without the padding after the longest text.

        The result is the same, and prompts fill a fifth of CLIP's 77 tokens; similar lengths share a batch.
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

        Its parameters require gradients; the encoder itself is unchanged. On the encoder's device, in evaluation mode.
        """
        from winnow.pretrain.models.towers import ImageEncoder

        return ImageEncoder(copy.deepcopy(self._model)).requires_grad_(True).eval()

    def _infer(self, encode: Any, batch: torch.Tensor) -> Any:
        import torch

        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return encode(batch.to(self._device))

    def _run(self, encode: Any, batch: torch.Tensor) -> np.ndarray:
        import torch

        features = self._infer(encode, batch)
        features = torch.nn.functional.normalize(features.float(), dim=-1)
        result: np.ndarray = features.cpu().numpy()
        return result
