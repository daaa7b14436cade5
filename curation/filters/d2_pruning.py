"""D2 pruning: select hard and diverse samples by messages over the k-nearest-neighbour graph."""

from __future__ import annotations

import heapq
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from winnow.curation.columns.pool_columns import collect
from winnow.curation.columns.table import State, View, model_columns
from winnow.curation.filters.base import Fraction, Model, Positive, Scope, SelectionFilter, ThresholdFilter, as_state
from winnow.curation.search.neighbours import nearest_neighbours
from winnow.infra.errors import WinnowError
from winnow.infra.params import params

Gamma = Annotated[float, Field(ge=0)]
_FEATURES = {"image": slice(0, 1), "text": slice(1, 2), "both": slice(0, 2)}


@params
class D2Pruning(ThresholdFilter, SelectionFilter):
    """Select samples one by one by their and their neighbours' scores, lowering those of the neighbours each time.

    Maharana et al. 2023 (D2 Pruning), section 3. With N(i) the k nearest neighbours of i by Euclidean distance d:

    - forward (equation 3): x_i = s_i + sum over j in N(i) of exp(-gamma_f d(i,j)^2) s_j;
    - select the sample k with the largest x among those not yet selected;
    - reverse (equation 5): x_j = x_j - exp(-gamma_r d(k,j)^2) x_k for all j in N(k); repeat until the budget,
      `int(n * fraction)` or `keep`, is reached.

    N(i) is directed, as in the authors' code for DataComp. The defaults are those of that code: one neighbour, gamma 1,
    both embeddings concatenated. Deviations: the maximum is exact, where that code approximates it in sorted order;
    scores are not changed, where that code adds 0.115 and clips at 1e-7; equal x are taken in pool order; above 200,000
    samples the neighbours come from an inverted file, whose recall the funnel reports, instead of product quantisation.

    Args:
        fraction: to keep, in (0, 1].
        neighbors: k.
        gamma_f, gamma_r: of the forward and the reverse messages; at least 0.
        features: "image", "text", or "both" (the embeddings concatenated).
        score: column of the difficulty s; None for the model's CLIP score.
        model: whose embeddings and score, as for `clip_score`.
        keep: how many to keep; instead of a fraction.
        of: `pool` or `survivors`: what is selected from.
    """

    fraction: Fraction | None = None
    neighbors: Positive = 1
    gamma_f: Gamma = 1.0
    gamma_r: Gamma = 1.0
    features: Literal["image", "text", "both"] = "both"
    score: str | None = None
    model: Model = "scorer"
    keep: Positive | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "d2_pruning"
    paper: ClassVar[str] = "Maharana et al. 2023 (D2 Pruning)"
    example: ClassVar[dict[str, Any]] = {"fraction": 0.3}

    def numeric(self) -> tuple[str, ...]:
        return (*model_columns(self.model)[_FEATURES[self.features]], self.score or model_columns(self.model)[2])

    def fit(self, view: View) -> State:
        *vectors, score = self.numeric()
        pool = collect(view, vectors, (score,))
        if len(pool) <= self.neighbors:
            raise WinnowError(f"{len(pool)} samples have no {self.neighbors} neighbours each", do="Ask for fewer.")
        parts = list(pool.vectors.values())
        points = np.concatenate(parts, axis=1) if parts[1:] else parts[0]
        neighbours, squared, recall = nearest_neighbours(points, self.neighbors)
        budget = int(pool.total * self.fraction) if self.fraction is not None else int(self.keep or 0)
        x = forward(pool.numbers[score], neighbours, squared, self.gamma_f)
        order = select(x, neighbours, np.exp(-self.gamma_r * squared), min(budget, len(pool)))
        mask = np.zeros(len(pool), dtype=bool)
        mask[order] = True
        return as_state(pool.uids, mask, neighbour_recall=np.array(recall))


def forward(scores: np.ndarray, neighbours: np.ndarray, squared: np.ndarray, gamma: float) -> np.ndarray:
    """The forward message (equation 3); float64, shape [n]. `neighbours` and `squared`: shape [n, k]."""
    return scores + (np.exp(-gamma * squared) * scores[neighbours]).sum(axis=1)


def select(x: np.ndarray, neighbours: np.ndarray, weights: np.ndarray, budget: int) -> list[int]:
    """The samples in the order of their selection, up to the budget.

    Args:
        x: node values, float64, shape [n].
        neighbours, weights: of the reverse messages, shape [n, k].
    """
    now = x.tolist()
    heap = [(-value, i) for i, value in enumerate(now)]
    heapq.heapify(heap)
    done = bytearray(len(now))
    order: list[int] = []
    while len(order) < budget:
        key, i = heapq.heappop(heap)
        value = now[i]
        # Every open node has an entry at least as good as its value. A worse entry is outdated.
        if done[i] or -key < value:
            continue
        if -key > value:
            heapq.heappush(heap, (-value, i))
            continue
        done[i] = 1
        order.append(i)
        for j, weight in zip(neighbours[i].tolist(), weights[i].tolist(), strict=True):
            now[j] -= weight * value
            if value < 0:
                heapq.heappush(heap, (-now[j], j))
    return order
