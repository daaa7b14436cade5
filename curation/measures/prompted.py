"""Probabilities from the CLIP embedding, by a trained head or by pairs of prompts."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.measures.base import Device, Instance, Measure, Samples
from winnow.curation.measures.heads import apply_head, prompt_probability
from winnow.infra.io.arrow import as_matrix
from winnow.infra.io.content import content_digest
from winnow.infra.params import ParameterError, params


@params
class Prompted(Measure):
    """`score`: a probability that the subclass defines, float32.

    With `head`, its output, by default through a sigmoid; otherwise zero-shot, by pairs of a prompt and its opposite
    and the encoder of the embeddings (Wang, Chan & Loy 2023, CLIP-IQA, equations 1 and 2), averaged over pairs.

    Args:
        head: .safetensors, .npz or .npy file; see `winnow.curation.measures.heads.read_head`. None for the prompts.
        relu, sigmoid: whether the head has ReLUs between its layers and a sigmoid after them.
        yes, no: prompts, pair by pair; empty for those of the class.
        encoder, digest: of the embeddings, as in `clip`. Winnow fills them in.
        embedding: the instance of `clip` whose image embeddings it reads.
        device: "auto", "cpu" or "cuda", for the prompts.
    """

    head: str | None = None
    relu: bool = True
    sigmoid: bool = True
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    encoder: str = ""
    digest: str = ""
    embedding: Instance = "clip"
    device: Device = "cpu"

    filled: ClassVar[tuple[str, ...]] = ("encoder", "digest")
    prompts: ClassVar[tuple[tuple[str, str], ...]]

    def __post_init__(self) -> None:
        if len(self.yes) != len(self.no):
            what = f"{self.name}: {len(self.yes)} prompts in `yes` and {len(self.no)} in `no` make no pairs"
            raise ParameterError(what).below("no")

    def derived(self) -> tuple[str, ...]:
        return (f"{self.embedding}.image",)

    @property
    def needs_encoder(self) -> bool:
        return self.head is None

    def setup(self) -> None:
        if self.head is None:
            _embedded(self.encoder, self.device, self.pairs())

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The prompts in use."""
        return tuple(zip(self.yes, self.no, strict=True)) or self.prompts

    def params(self) -> dict[str, Any]:
        if self.head is not None:
            return {"head": content_digest(self.head), "relu": self.relu, "sigmoid": self.sigmoid}
        return {"prompts": [list(pair) for pair in self.pairs()], "encoder": self.digest}

    def schema(self) -> pa.Schema:
        return pa.schema([("score", pa.float32())])

    def compute(self, samples: Samples) -> pa.Table:
        vectors, present = as_matrix(samples.table[self.derived()[0]])
        if self.head is not None:
            values = apply_head(self.head, vectors, self.relu, self.sigmoid)
        else:
            values = prompt_probability(vectors, *_embedded(self.encoder, self.device, self.pairs()))
        return pa.table([pa.array(values.astype(np.float32), pa.float32(), mask=~present)], schema=self.schema())


@functools.lru_cache(maxsize=4)
def _embedded(encoder: str, device: str, pairs: tuple[tuple[str, str], ...]) -> tuple[np.ndarray, np.ndarray, float]:
    from winnow.pretrain.encoder import load_encoder

    model = load_encoder(encoder, device=device, precision="auto")
    yes, no = zip(*pairs, strict=True)
    return model.encode_texts(yes), model.encode_texts(no), model.logit_scale
