"""Data filtering networks: keep pairs that a network trained on trusted pairs scores highly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from winnow.curation.filters.clip_score import ClipScore
from winnow.infra.params import params


@params
class Dfn(ClipScore):
    """Keep the pairs with the highest image-text cosine under a CLIP trained on high-quality pairs.

    Fang et al. 2023 (Data Filtering Networks), section 3. The decision is that of `clip_score`; the network differs.
    The recipe describes its training (`scorer: {trusted: {pool: TRUSTED}, train: {...}}`) or names a published
    network. The separate name makes reports say which of the two was meant.
    The parameters are those of `clip_score`; the paper keeps a fraction of 0.15 to 0.2.
    """

    name: ClassVar[str] = "dfn"
    paper: ClassVar[str] = "Fang et al. 2023 (DFN)"
    example: ClassVar[Mapping[str, Any]] = {"fraction": 0.15}
