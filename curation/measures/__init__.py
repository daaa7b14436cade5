"""Measures: columns computed once per sample and kept, so that thresholds change without computing anything again."""

from infra.registry import Registry

MEASURES = Registry(
    "measure",
    {
        "caption": "curation.measures.caption:Caption",
        "clip": "curation.measures.clip:Clip",
        "language": "curation.measures.language:Language",
    },
)
