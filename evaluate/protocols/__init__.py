"""The tables of protocols and kinds of task. Importing them, or what they name, imports no torch."""

from __future__ import annotations

from winnow.infra.registry import Registry

# How a task is scored; each names a `winnow.evaluate.protocols.base.Protocol`.
PROTOCOLS = Registry(
    "protocol",
    {
        "zeroshot": "winnow.evaluate.protocols.zeroshot:ZEROSHOT",
        "linear_probe": "winnow.evaluate.protocols.linear:LINEAR_PROBE",
        "linear_sgd": "winnow.evaluate.protocols.sgd:LINEAR_SGD",
        "knn": "winnow.evaluate.protocols.knn:KNN",
        "linear_1pct": "winnow.evaluate.protocols.few_labels:LINEAR_1PCT",
        "linear_10pct": "winnow.evaluate.protocols.few_labels:LINEAR_10PCT",
        "finetune_1pct": "winnow.evaluate.protocols.fine_tune:FINETUNE_1PCT",
        "finetune_10pct": "winnow.evaluate.protocols.fine_tune:FINETUNE_10PCT",
        "frechet": "winnow.evaluate.protocols.frechet:FRECHET",
    },
)
# What a test set consists of; each names a subclass of `winnow.evaluate.protocols.base.Kind`.
KINDS = Registry(
    "kind",
    {
        "zeroshot_classification": "winnow.evaluate.protocols.zeroshot:Classification",
        "grouped_classification": "winnow.evaluate.protocols.zeroshot:GroupedClassification",
        "multilabel": "winnow.evaluate.protocols.multilabel:Multilabel",
        "face_attributes": "winnow.evaluate.protocols.faces:FaceAttributes",
        "winogavil": "winnow.evaluate.protocols.winogavil:WinoGAViL",
        "retrieval": "winnow.evaluate.protocols.retrieval:Retrieval",
        "images": "winnow.evaluate.protocols.frechet:Images",
    },
)
