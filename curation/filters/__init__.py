"""Filters: decisions over columns, one file each, composed by `all`, `any`, `not`."""

from infra.registry import Registry

FILTERS = Registry(
    "filter",
    {
        "basic": "curation.filters.basic:Basic",
        "clip_score": "curation.filters.clip_score:ClipScore",
        "cluster_balanced": "curation.filters.cluster_balanced:ClusterBalanced",
        "d2_pruning": "curation.filters.d2_pruning:D2Pruning",
        "decontaminate": "curation.filters.decontaminate:Decontaminate",
        "dfn": "curation.filters.dfn:Dfn",
        "exact_duplicates": "curation.filters.exact_duplicates:ExactDuplicates",
        "image_based": "curation.filters.image_based:ImageBased",
        "image_cluster": "curation.filters.image_cluster:ImageCluster",
        "laion2b": "curation.filters.laion2b:Laion2b",
        "metaclip": "curation.filters.metaclip:MetaClip",
        "near_duplicates": "curation.filters.near_duplicates:NearDuplicates",
        "neg_clip_loss": "curation.filters.neg_clip_loss:NegClipLoss",
        "norm_sim": "curation.filters.norm_sim:NormSim",
        "random": "curation.filters.random_fraction:RandomFraction",
        "score": "curation.filters.score:Score",
        "semdedup": "curation.filters.semdedup:SemDeDup",
        "text_based": "curation.filters.text_based:TextBased",
    },
)
