"""Filters: decisions over columns, one file each, composed by `all`, `any`, `not`."""

from infra.registry import Registry

FILTERS = Registry(
    "filter",
    {
        "basic": "curation.filters.basic:Basic",
        "clip_score": "curation.filters.clip_score:ClipScore",
        "image_cluster": "curation.filters.image_cluster:ImageCluster",
    },
)
