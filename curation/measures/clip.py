"""CLIP embeddings of image and caption, and their cosine (Radford et al. 2021; Hessel et al. 2021, CLIPScore)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.measures.base import Device, Measure, Samples
from winnow.infra.errors import WinnowError
from winnow.infra.params import params
from winnow.infra.stages.resources import Resources

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder


@params
class Clip(Measure):
    """`clip.image`, `clip.text`: L2-normalised embeddings, float16 lists of fixed size; `clip.score`: their cosine.

    The score is the float32 inner product of the float32 embeddings, before they are rounded to float16. An image
    without a caption (as in target sets) has an image embedding only.

    Args:
        encoder: what `winnow.pretrain.encoder.load_encoder` takes; empty for the recipe's scorer.
        digest: of the encoder's content, which enters the content key instead of its path. Winnow fills it in.
        device: "auto", "cpu" or "cuda".
    """

    encoder: str = ""
    digest: str = ""
    device: Device = "auto"

    name: ClassVar[str] = "clip"
    version: ClassVar[int] = 2
    pixels: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("text",)
    filled: ClassVar[tuple[str, ...]] = ("digest",)
    summary: ClassVar[str] = "image and text embeddings and their cosine, by the recipe's scorer or by `encoder`"

    def params(self) -> dict[str, Any]:
        return {"encoder": self.digest}

    @property
    def resources(self) -> Resources:
        return Resources(gpus=0 if self.device == "cpu" else 1, gpu_optional=self.device == "auto")

    def _encoder(self) -> Encoder:
        from winnow.pretrain.encoder import load_encoder

        return load_encoder(self.encoder, device=self.device, precision="auto")

    def setup(self) -> None:
        self._encoder()

    def schema(self) -> pa.Schema:
        vector = pa.list_(pa.float16(), self._encoder().dim)
        return pa.schema([("image", vector), ("text", vector), ("score", pa.float32())])

    def fields(self) -> tuple[str, ...]:
        return ("image", "text", "score")

    def compute(self, samples: Samples) -> pa.Table:
        import torch

        from winnow.pretrain.encoder import not_finite

        encoder = self._encoder()
        n, dim = len(samples), encoder.dim
        captions = samples.table["text"].to_pylist()
        seen = np.array([image is not None for image in samples.images], dtype=bool)
        read = np.array([text is not None for text in captions], dtype=bool)
        image, text = np.zeros((n, dim), np.float32), np.zeros((n, dim), np.float32)
        if seen.any():
            crops = torch.stack([encoder.crop(shown) for shown in samples.images if shown is not None])
            image[seen] = encoder.encode_images(encoder.normalise(crops))
        if read.any() and encoder.has_text:
            text[read] = encoder.encode_texts([caption for caption in captions if caption is not None])
        else:
            read[:] = False
        if fault := not_finite(images=image, captions=text):
            raise WinnowError(fault, where=self.encoder)
        score = pa.array(np.einsum("nd,nd->n", image, text, dtype=np.float32), pa.float32(), mask=~(seen & read))
        columns = [_vectors(image, seen, dim), _vectors(text, read, dim), score]
        return pa.Table.from_arrays(columns, schema=self.schema())


def _vectors(values: np.ndarray, present: np.ndarray, dim: int) -> pa.Array:
    flat = pa.array(values.astype(np.float16).ravel(), pa.float16())
    mask = None if present.all() else pa.array(~present)
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=mask)
