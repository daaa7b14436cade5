"""WinoGAViL (Bitton et al. 2022): which images belong to a cue.

As in DataComp's evaluation the cue reads "A cat" or "An owl", in lower case; as many images are selected as belong to
it, those nearest to it, and the score is the Jaccard index of the selected and the right ones. DataComp embeds in half
precision on a GPU and leaves ties to the sorting routine; here it is full precision, and of equal scores the first
candidate wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import SEED, EvalSet, Features, Kind, Row, SetTexts, Target
from winnow.evaluate.sets.files import read_lines
from winnow.evaluate.sets.packed import ASSOCIATIONS
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.io import storage
from winnow.infra.io.text import read_json_text
from winnow.infra.pool.sample import Sample

# Names as DataComp writes them: number of candidates from, to.
SETTINGS = {
    "avg_jaccard_score": (0, None),
    "jaccard_score_5": (5, 5),
    "jaccard_score_6": (6, 6),
    "jaccard_score_10": (10, 10),
    "jaccard_score_12": (12, 12),
    "jaccard_score_5-6": (0, 6),
    "jaccard_score_10-12": (10, None),
}


@dataclass(frozen=True)
class Association:
    """A cue, the keys of the images shown with it, and of those that belong to it."""

    cue: str
    candidates: tuple[str, ...]
    selected: frozenset[str]


class WinoGAViL(Kind):
    """Images, and which of them belong to a cue."""

    metric = "avg_jaccard_score"

    def open(self, task: Task, url: str) -> SetTexts:
        """`extra` is the list of associations."""
        return SetTexts(extra=read_associations(url))

    def read(self, sample: Sample) -> Target:
        return Target()

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        return winogavil(features, test_set)

    def count(self, test_set: EvalSet, images: int) -> int:
        return len(test_set.texts.extra)


def read_associations(url: str) -> list[Association]:
    """The associations in a set's `associations.jsonl`. Raises TaskError naming the line at fault."""
    path = storage.join(url, ASSOCIATIONS)
    found = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        try:
            entry = read_json_text(line)
            candidates = tuple(entry["candidates"])
            # Those that were not shown do not count, as in DataComp's evaluation.
            one = Association(entry["cue"], candidates, frozenset(entry["associations"]) & set(candidates))
            faulty = not one.cue or not one.selected
        except (ValueError, TypeError, KeyError):
            faulty = True
        if faulty:
            what = "should be an object with a cue, candidates, and associations among them"
            raise TaskError(what, where=f"{path}:{number}")
        found.append(one)
    return found


def prompt(cue: str) -> str:
    """ "Owl" -> "An owl"."""
    cue = cue.lower()
    return f"An {cue}" if cue.startswith(("a", "e", "i", "o", "u")) else f"A {cue}"


def winogavil(features: Features, test_set: EvalSet) -> list[Row]:
    """Mean Jaccard index by number of candidates. Associations with an image that cannot be decoded are left out of
    `n`; a number of candidates that does not occur has no row."""
    index = {key: i for i, key in enumerate(features.keys)}
    cues = [one for one in test_set.texts.extra if index.keys() >= set(one.candidates)]
    prompts = list(dict.fromkeys(prompt(one.cue) for one in cues))
    texts = dict(zip(prompts, features.encode_texts(prompts), strict=True)) if prompts else {}

    def score(one: Association) -> float:
        images = features.images[[index[key] for key in one.candidates]]
        right = np.array([key in one.selected for key in one.candidates])
        return metrics.jaccard(metrics.first(images @ texts[prompt(one.cue)], int(right.sum())), right)

    scores, sizes = np.array([score(one) for one in cues]), np.array([len(one.candidates) for one in cues])
    rows = []
    for name, (low, high) in SETTINGS.items():
        batch = scores[(sizes >= low) & (sizes <= (high or sizes))]
        if len(batch):
            rows.append(Row(name, float(batch.mean()), len(batch), metrics.mean_stderr(batch, SEED)))
    return rows
