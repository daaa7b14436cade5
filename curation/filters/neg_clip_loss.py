"""negCLIPLoss: the CLIP score minus the normalisation term of the contrastive loss."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from winnow.curation.columns.pool_columns import collect, passing
from winnow.curation.columns.table import State, View, model_columns
from winnow.curation.filters.base import Fraction, Model, Positive, Scope, SelectionFilter, ThresholdFilter, as_state
from winnow.infra.params import params

_ROWS = 2048


@params
class NegClipLoss(ThresholdFilter, SelectionFilter):
    """Keep samples whose negative CLIP loss, averaged over random batches, is largest.

    Wang et al. 2024 ("CLIPLoss and Norm-Based Data Selection Methods"), section 3.1: for sample i in a batch B, with
    image embedding f, text embedding g and temperature tau,

        negCLIPLoss(i) = f_i.g_i - tau/2 [log sum_{j in B} exp(f_i.g_j / tau) + log sum_{j in B} exp(f_j.g_i / tau)],

    with the bracket averaged over K random divisions of the pool into batches of |B|; the last batch of a division
    may be smaller. Deviation: the authors' code divides each shard, this filter the whole pool.

    Args:
        fraction, threshold, keep, of: as for `clip_score`.
        tau: the scorer's temperature (0.01 for OpenAI's CLIP).
        batch_size: |B|.
        batches: K, the number of divisions.
        seed: of the divisions.
        model: whose embeddings, as for `clip_score`.
    """

    fraction: Fraction | None = None
    threshold: float | None = None
    tau: Annotated[float, Field(gt=0)] = 0.01
    batch_size: Positive = 32_768
    batches: Positive = 10
    seed: int = 0
    model: Model = "scorer"
    keep: Positive | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "neg_clip_loss"
    paper: ClassVar[str] = "Wang et al. 2024 (negCLIPLoss, NormSim)"
    example: ClassVar[dict[str, Any]] = {"fraction": 0.3}

    def numeric(self) -> tuple[str, ...]:
        return model_columns(self.model)[:2]

    def fit(self, view: View) -> State:
        pool = collect(view, self.numeric())
        rng = np.random.default_rng(self.seed)
        divisions = [rng.permutation(len(pool)) for _ in range(self.batches)]
        image, text = (pool.vectors[name] for name in self.numeric())
        scores = neg_clip_loss(image, text, divisions, self.tau, self.batch_size)
        return as_state(pool.uids, passing(self.cutoff, pool.uids, scores, pool.total))


def neg_clip_loss(
    image: np.ndarray, text: np.ndarray, divisions: list[np.ndarray], tau: float, batch_size: int
) -> np.ndarray:
    """negCLIPLoss of each pair, float64, shape [n]. 2,048 rows of logits are in memory at a time.

    Args:
        image, text: L2-normalised embeddings, shape [n, d].
        divisions: permutations of 0 to n - 1; each is cut into batches of `batch_size`.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cosine = np.empty(len(image))
    for start in range(0, len(image), _ROWS):
        part = slice(start, start + _ROWS)
        cosine[part] = np.einsum("nd,nd->n", image[part].astype(np.float32), text[part].astype(np.float32))
    norm = np.zeros(len(image))
    for order in divisions:
        for start in range(0, len(order), batch_size):
            rows = np.sort(order[start : start + batch_size])
            f = torch.from_numpy(np.asarray(image[rows], np.float32)).to(device)
            g = torch.from_numpy(np.asarray(text[rows], np.float32)).to(device)
            over_images = torch.full((len(rows),), -torch.inf, device=device)
            over_texts = []
            for batch in f.split(_ROWS):
                logits = batch @ g.T / tau
                over_texts.append(torch.logsumexp(logits, 1))
                over_images = torch.logaddexp(over_images, torch.logsumexp(logits, 0))
            norm[rows] += (torch.cat(over_texts) + over_images).double().cpu().numpy()
    return cosine - tau / 2 * norm / len(divisions)
