"""The aesthetic score of an image, by a head on its CLIP embedding."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.measures.base import Instance, Measure, Samples
from winnow.curation.measures.heads import apply_head
from winnow.infra.io.arrow import as_matrix
from winnow.infra.io.content import content_digest
from winnow.infra.params import params


@params
class Aesthetic(Measure):
    """`aesthetic.score`: about 1 to 10, float32.

    Schuhmann et al. 2022 (LAION-5B), LAION-Aesthetics: a head trained on ratings of images over their L2-normalised
    CLIP embedding. LAION's heads are for OpenAI's ViT-L/14: the linear one (`sa_0_4_vit_l_14_linear`), and the
    "improved aesthetic predictor" (`sac+logos+ava1-l14-linearMSE`) of five linear layers without activations at
    inference. Convert the published .pth to .safetensors with the same names. The embeddings must come from the model
    that the head was trained on.

    Args:
        head: .safetensors, .npz or .npy file; see `winnow.curation.measures.heads.read_head`.
        relu: whether the head has ReLUs between its layers.
        embedding: the instance of `clip` whose image embeddings it reads.
    """

    head: str
    relu: bool = False
    embedding: Instance = "clip"

    name: ClassVar[str] = "aesthetic"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "aesthetic score by a head on the CLIP embedding (LAION-Aesthetics)"
    example: ClassVar[dict[str, Any]] = {"head": "head.npy"}

    def derived(self) -> tuple[str, ...]:
        return (f"{self.embedding}.image",)

    def params(self) -> dict[str, Any]:
        return {"head": content_digest(self.head), "relu": self.relu}

    def schema(self) -> pa.Schema:
        return pa.schema([("score", pa.float32())])

    def compute(self, samples: Samples) -> pa.Table:
        vectors, present = as_matrix(samples.table[self.derived()[0]])
        scores = apply_head(self.head, vectors, relu=self.relu).astype(np.float32)
        return pa.table([pa.array(scores, pa.float32(), mask=~present)], schema=self.schema())
