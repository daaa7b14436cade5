"""Whether an image is not safe for work."""

from __future__ import annotations

from typing import ClassVar

from winnow.curation.measures.prompted import Prompted
from winnow.infra.params import params


@params
class Nsfw(Prompted):
    """`nsfw.score`: probability of sexual content, float32, by a head on the CLIP embedding or zero-shot by prompts.

    A head such as LAION's CLIP-based NSFW detector (Schuhmann et al. 2022, LAION-5B), converted to .safetensors, is
    more reliable. The prompts are a coarse substitute: look at their scores before you set a threshold.
    """

    name: ClassVar[str] = "nsfw"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "probability of sexual content, by a head or prompts on the CLIP embedding"
    prompts: ClassVar[tuple[tuple[str, str], ...]] = (
        ("a photo of a naked person", "a photo of a dressed person"),
        ("pornography", "a picture for all ages"),
        ("an explicit sexual image", "an image without sexual content"),
    )
