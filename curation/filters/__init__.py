"""Filters: decisions over columns, one file each, combined by `all`, `any`, `not`."""

from winnow.infra.registry import Registry

FILTERS = Registry(
    "filter",
    {
        "basic": "winnow.curation.filters.basic:Basic",
        "clip_score": "winnow.curation.filters.clip_score:ClipScore",
        "cluster_balanced": "winnow.curation.filters.cluster_balanced:ClusterBalanced",
        "d2_pruning": "winnow.curation.filters.d2_pruning:D2Pruning",
        "decontaminate": "winnow.curation.filters.decontaminate:Decontaminate",
        "dfn": "winnow.curation.filters.dfn:Dfn",
        "exact_duplicates": "winnow.curation.filters.exact_duplicates:ExactDuplicates",
        "image_based": "winnow.curation.filters.image_based:ImageBased",
        "image_cluster": "winnow.curation.filters.image_cluster:ImageCluster",
        "laion2b": "winnow.curation.filters.laion2b:Laion2b",
        "metaclip": "winnow.curation.filters.metaclip:MetaClip",
        "near_duplicates": "winnow.curation.filters.near_duplicates:NearDuplicates",
        "neg_clip_loss": "winnow.curation.filters.neg_clip_loss:NegClipLoss",
        "norm_sim": "winnow.curation.filters.norm_sim:NormSim",
        "random": "winnow.curation.filters.random_fraction:RandomFraction",
        "score": "winnow.curation.filters.score:Score",
        "semdedup": "winnow.curation.filters.semdedup:SemDeDup",
        "text_based": "winnow.curation.filters.text_based:TextBased",
    },
)
