"""Whether an image has a watermark."""

from __future__ import annotations

from typing import ClassVar

from winnow.curation.measures.prompted import Prompted
from winnow.infra.params import params


@params
class Watermark(Prompted):
    """`watermark.score`: probability of a watermark, float32, by a head on the CLIP embedding or zero-shot by prompts.

    Schuhmann et al. 2022 (LAION-5B) train a network for this probability. A head trained on its labels can be given.
    The prompts are a coarse substitute: look at their scores before you set a threshold.
    """

    name: ClassVar[str] = "watermark"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "probability of a watermark, by a head or prompts on the CLIP embedding"
    prompts: ClassVar[tuple[tuple[str, str], ...]] = (
        ("a photo with a watermark", "a photo without a watermark"),
        ("a stock photo with text over it", "a photo without any text"),
    )
