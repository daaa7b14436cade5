"""Winnow: curate web image–text shards, pretrain on the subsets, and say which subset was better.

Importing this package imports nothing else. Each name below is loaded when it is first used.

    >>> import pyarrow as pa, winnow
    >>> table = pa.table({"text": ["a red cup", "IMG_2041", "two dogs on grass"], "clip.score": [0.31, 0.12, 0.25]})
    >>> tree = winnow.ClipScore(fraction=0.5) & ~winnow.ClipScore(threshold=0.3)
    >>> winnow.apply(tree, table)["text"].to_pylist()
    ['two dogs on grass']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.curation.algebra.in_memory import Fitted, apply, fit
    from winnow.curation.algebra.nodes import All, AnyOf, Node, Not
    from winnow.curation.filters.basic import Basic
    from winnow.curation.filters.clip_score import ClipScore
    from winnow.curation.filters.cluster_balanced import ClusterBalanced
    from winnow.curation.filters.d2_pruning import D2Pruning
    from winnow.curation.filters.decontaminate import Decontaminate
    from winnow.curation.filters.dfn import Dfn
    from winnow.curation.filters.exact_duplicates import ExactDuplicates
    from winnow.curation.filters.image_based import ImageBased
    from winnow.curation.filters.image_cluster import ImageCluster
    from winnow.curation.filters.laion2b import Laion2b
    from winnow.curation.filters.metaclip import MetaClip
    from winnow.curation.filters.near_duplicates import NearDuplicates
    from winnow.curation.filters.neg_clip_loss import NegClipLoss
    from winnow.curation.filters.norm_sim import NormSim
    from winnow.curation.filters.random_fraction import RandomFraction
    from winnow.curation.filters.score import Score
    from winnow.curation.filters.semdedup import SemDeDup
    from winnow.curation.filters.text_based import TextBased
    from winnow.infra.errors import StorageError, UsageError, WinnowError
    from winnow.infra.pool.pool import Pool
    from winnow.infra.pool.sample import Sample
    from winnow.pipeline.api import compare, embed, evaluate_encoders, index, measure, open_pool, parse_filters, run
    from winnow.pretrain.encoder import Encoder, load_encoder

__version__ = "0.1.0"
__all__ = [
    "All",
    "AnyOf",
    "Basic",
    "ClipScore",
    "ClusterBalanced",
    "D2Pruning",
    "Decontaminate",
    "Dfn",
    "Encoder",
    "ExactDuplicates",
    "Fitted",
    "ImageBased",
    "ImageCluster",
    "Laion2b",
    "MetaClip",
    "NearDuplicates",
    "NegClipLoss",
    "Node",
    "NormSim",
    "Not",
    "Pool",
    "RandomFraction",
    "Sample",
    "Score",
    "SemDeDup",
    "TextBased",
    "StorageError",
    "UsageError",
    "WinnowError",
    "apply",
    "compare",
    "embed",
    "evaluate_encoders",
    "fit",
    "index",
    "load_encoder",
    "measure",
    "open_pool",
    "parse_filters",
    "run",
]

_EXPORTS = {
    "winnow.curation.algebra.in_memory": ("Fitted", "apply", "fit"),
    "winnow.curation.algebra.nodes": ("All", "AnyOf", "Node", "Not"),
    "winnow.curation.filters.basic": ("Basic",),
    "winnow.curation.filters.clip_score": ("ClipScore",),
    "winnow.curation.filters.cluster_balanced": ("ClusterBalanced",),
    "winnow.curation.filters.d2_pruning": ("D2Pruning",),
    "winnow.curation.filters.decontaminate": ("Decontaminate",),
    "winnow.curation.filters.dfn": ("Dfn",),
    "winnow.curation.filters.exact_duplicates": ("ExactDuplicates",),
    "winnow.curation.filters.image_based": ("ImageBased",),
    "winnow.curation.filters.image_cluster": ("ImageCluster",),
    "winnow.curation.filters.laion2b": ("Laion2b",),
    "winnow.curation.filters.metaclip": ("MetaClip",),
    "winnow.curation.filters.near_duplicates": ("NearDuplicates",),
    "winnow.curation.filters.neg_clip_loss": ("NegClipLoss",),
    "winnow.curation.filters.norm_sim": ("NormSim",),
    "winnow.curation.filters.random_fraction": ("RandomFraction",),
    "winnow.curation.filters.score": ("Score",),
    "winnow.curation.filters.semdedup": ("SemDeDup",),
    "winnow.curation.filters.text_based": ("TextBased",),
    "winnow.infra.errors": ("StorageError", "UsageError", "WinnowError"),
    "winnow.infra.pool.pool": ("Pool",),
    "winnow.infra.pool.sample": ("Sample",),
    "winnow.pipeline.api": (
        "compare",
        "embed",
        "evaluate_encoders",
        "index",
        "measure",
        "open_pool",
        "parse_filters",
        "run",
    ),
    "winnow.pretrain.encoder": ("Encoder", "load_encoder"),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
