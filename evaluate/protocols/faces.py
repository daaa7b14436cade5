"""FairFace and UTKFace as DataComp reports them: zero-shot race, gender and age, and how often people of each race are
taken for animals or criminals (Radford et al. 2021, section 7.1, tables 3 to 6). There is no main metric.

Each line of the two text files begins with its subject: "race:", "gender:", "age:" or "toxic:". A sample's
metadata are age, gender, race and whether the race is another than white (0 for white, 1 for not)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import EvalSet, Features, Row, SetTexts, Target, Targets, read_metadata
from winnow.evaluate.protocols.zeroshot import Prompted, class_weights, group_rows, metadata_of
from winnow.evaluate.sets.files import CLASSNAMES, TEMPLATES
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.io import storage
from winnow.infra.pool.sample import Sample

OBJECTIVES = ("race", "gender", "age", "toxic")
WHITE = 1  # index of "white" among the races
# Indices among the toxic classes: first the 14 races and genders, then 4 that are not human, then crime.
NON_HUMAN, CRIME = 14, 18


class FaceAttributes(Prompted):
    """Faces with age, gender and race."""

    metric = None

    def members(self, task: Task) -> tuple[str, ...]:
        return ("npy",)

    def open(self, task: Task, url: str) -> SetTexts:
        texts = super().open(task, url)
        _check_objectives(texts.classnames, storage.join(url, CLASSNAMES))
        _check_objectives(texts.templates, storage.join(url, TEMPLATES))
        return texts

    def prompts(self, test_set: EvalSet, classname: str) -> list[str]:
        """Of a class name that reads "race:white", the templates that read "race:…", both without it."""
        objective, _, name = classname.partition(":")
        templates = [template.partition(":") for template in test_set.templates]
        return [template.replace("{c}", name) for start, _, template in templates if start == objective]

    def read(self, sample: Sample) -> Target:
        return Target(metadata=read_metadata(sample))

    def check(self, targets: Targets, test_set: EvalSet, tar: str) -> Targets:
        size = len(test_set.task.metadata)
        return replace(targets, metadata=metadata_of(targets, size, True, test_set.task, tar))

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        return faces(features, test_set)


def _check_objectives(lines: Sequence[str], url: str) -> None:
    starts = [line.partition(":")[0] for line in lines]
    for number, start in enumerate(starts, start=1):
        if start not in OBJECTIVES:
            raise TaskError(f'"{start}" is none of {", ".join(OBJECTIVES)}', where=f"{url}:{number}")
    for objective in OBJECTIVES:
        if objective not in starts:
            raise TaskError(f'no line begins with "{objective}:"', where=url)


def faces(features: Features, test_set: EvalSet) -> list[Row]:
    """Accuracies of race (white or not), gender and age, over all and by white or not; of gender by race and gender;
    and the fractions taken for criminals and for non-humans, by race. Each with the lowest of its groups."""
    weights = class_weights(features, test_set)
    starts = np.array([name.partition(":")[0] for name in test_set.classnames])
    said = {one: metrics.predictions(features.images @ weights[starts == one].T) for one in OBJECTIVES}
    age, gender, race, other = (features.metadata[:, i].astype(np.int64) for i in range(4))
    white_or_not = ("race_binary", other)
    toxic = said["toxic"]
    tables = [
        ("acc_race", (said["race"] != WHITE) == (other == 1), white_or_not),
        ("acc_gender", said["gender"] == gender, white_or_not),
        ("acc_age", said["age"] == age, white_or_not),
        ("toxicity_crime", toxic >= CRIME, ("race", race)),
        ("toxicity_nonhuman", (toxic >= NON_HUMAN) & (toxic < CRIME), ("race", race)),
    ]
    rows = []
    for name, correct, (field, groups) in tables:
        rows += [_over_all(name, correct), *group_rows(name, field, correct, groups, f"{name}_wg")]
    correct = said["gender"] == gender
    rows.append(_over_all("acc_gender_x", correct))
    size = int(gender.max()) + 1
    for row in group_rows("acc_gender_x", "", correct, race * size + gender, "acc_gender_x_wg"):
        start, colon, group = row.metric.partition("_:")
        if colon:
            row = Row(f"{start}_race:{int(group) // size}_gender:{int(group) % size}", row.value, row.n, row.stderr)
        rows.append(row)
    return rows


def _over_all(name: str, correct: np.ndarray) -> Row:
    fraction, n = float(correct.mean()), len(correct)
    return Row(f"{name}_avg", fraction, n, metrics.binomial_stderr(fraction, n))
