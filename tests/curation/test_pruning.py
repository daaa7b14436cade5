"""SemDeDup, D2 pruning, negCLIPLoss, NormSim and balanced sampling against the papers written plainly."""

import math

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, embeddings, halves, kept, sphere, uids
from winnow.curation.filters.cluster_balanced import ClusterBalanced, quotas
from winnow.curation.filters.d2_pruning import D2Pruning, select
from winnow.curation.filters.neg_clip_loss import NegClipLoss, neg_clip_loss
from winnow.curation.filters.norm_sim import NormSim
from winnow.curation.filters.random_fraction import RandomFraction
from winnow.curation.filters.semdedup import SemDeDup, similarity_before
from winnow.curation.search.centroids import assign
from winnow.curation.search.kmeans import train_centroids
from winnow.curation.search.neighbours import cosine_pairs, nearest_neighbours
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError, build


def bunches(rng, n=300, d=12, centres=40, sem=0.15):
    """Vectors in tight bunches, so that there are duplicates to find."""
    base = sphere(rng, centres, d)[rng.integers(0, centres, n)]
    vectors = base + sem * rng.normal(size=(n, d)) / math.sqrt(d)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pool(vectors, **more):
    return pa.table({"uid": uids(len(vectors)), "clip.image": embeddings(vectors), **more})


def semdedup(vectors, centroids, epsilon, which):
    """Algorithm A7 of the paper, one sample at a time."""
    label = np.argmax(vectors @ centroids.T, axis=1)
    removed = set()
    for cluster in range(len(centroids)):
        members = [i for i in range(len(vectors)) if label[i] == cluster]
        distance = {i: 1 - float(vectors[i] @ centroids[cluster]) for i in members}
        members.sort(key=lambda i: (-distance[i] if which == "hard" else distance[i], i))
        similarity = np.triu(vectors[members] @ vectors[members].T, k=1) if members else np.zeros((0, 0))
        for column, i in enumerate(members):
            if similarity[:, column].max(initial=0) > 1 - epsilon:
                removed.add(i)
    return [i not in removed for i in range(len(vectors))]


@pytest.mark.parametrize("which", ["hard", "easy"])
@pytest.mark.parametrize("epsilon", [0.01, 0.02, 0.1])
def test_semdedup_is_the_papers(which, epsilon):
    vectors = halves(bunches(np.random.default_rng(0)))
    centroids = train_centroids(vectors.astype(np.float16), 7, seed=3)
    expected = semdedup(vectors, centroids.astype(np.float64), epsilon, which)
    node = SemDeDup(clusters=7, epsilon=epsilon, which_to_keep=which, seed=3)
    assert 0 < sum(expected) < len(expected)
    assert kept(node, pool(vectors)).tolist() == expected


def test_semdedup_keeps_the_given_fraction_and_reports_its_epsilon():
    vectors = halves(bunches(np.random.default_rng(1)))
    table = pool(vectors)
    node = SemDeDup(clusters=5, fraction=0.4)
    state = node.fit(Columns(table))
    mask = node.mask(table, state)
    assert mask.sum() >= int(300 * 0.4) + 1
    epsilon = node.report(state)["epsilon"]
    assert kept(SemDeDup(clusters=5, epsilon=epsilon - 1e-6), table).tolist() == mask.tolist()
    similarity = similarity_before(vectors, assign(vectors, train_centroids(vectors, 5)), np.arange(300.0))
    assert similarity.min() == 0  # the first of each cluster has none before it


def test_semdedup_in_random_order_keeps_no_pair_of_duplicates():
    vectors = halves(bunches(np.random.default_rng(2)))
    node = SemDeDup(clusters=1, epsilon=0.02, which_to_keep="random")
    mask = kept(node, pool(vectors))
    # With one cluster: whatever is dropped has a duplicate, though that may have been dropped because of another.
    cosine = vectors @ vectors.T - 2 * np.eye(300)
    assert not (cosine[np.ix_(mask, mask)] > 0.98 + 1e-6).any()
    assert (cosine[~mask].max(axis=1) > 0.98 - 1e-6).all()
    other = kept(SemDeDup(clusters=1, epsilon=0.02, which_to_keep="random", seed=1), pool(vectors))
    assert other.tolist() != mask.tolist()


def test_semdedup_blocks_make_no_difference(monkeypatch):
    vectors = halves(bunches(np.random.default_rng(3)))
    label, sort_key = np.zeros(300, int), np.random.default_rng(0).normal(size=300)
    whole = similarity_before(vectors, label, sort_key)
    monkeypatch.setattr("winnow.curation.filters.semdedup._BLOCK", 17)
    assert np.allclose(similarity_before(vectors, label, sort_key), whole, atol=1e-6)


def d2(vectors, scores, k, gamma_f, gamma_r, budget):
    """Section 3 of the paper, with the whole distance matrix and a plain maximum."""
    n = len(vectors)
    squared = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    neighbours = [sorted((j for j in range(n) if j != i), key=lambda j: squared[i, j])[:k] for i in range(n)]
    x = [scores[i] + sum(math.exp(-gamma_f * squared[i, j]) * scores[j] for j in neighbours[i]) for i in range(n)]
    selected = []
    while len(selected) < budget:
        best = max((i for i in range(n) if i not in selected), key=lambda i: (x[i], -i))
        selected.append(best)
        for j in neighbours[best]:
            x[j] -= math.exp(-gamma_r * squared[best, j]) * x[best]
    return selected


@pytest.mark.parametrize(("k", "gamma_f", "gamma_r", "low"), [(1, 1, 1, 0.1), (5, 0.5, 2.0, -0.4), (3, 1, 0, 0.1)])
def test_d2_pruning_is_the_papers(k, gamma_f, gamma_r, low):
    rng = np.random.default_rng(4)
    image, text = halves(bunches(rng, 120)), halves(sphere(rng, 120, 5))
    scores = rng.uniform(low, 0.5, 120)
    table = pool(image, **{"clip.text": embeddings(text), "clip.score": scores})
    node = D2Pruning(fraction=0.6, neighbors=k, gamma_f=gamma_f, gamma_r=gamma_r)
    expected = d2(np.concatenate([image, text], axis=1), scores, k, gamma_f, gamma_r, 72)
    assert np.nonzero(kept(node, table))[0].tolist() == sorted(expected)
    alone = D2Pruning(keep=30, neighbors=k, gamma_f=gamma_f, gamma_r=gamma_r, features="image")
    expected = d2(image, scores, k, gamma_f, gamma_r, 30)
    assert np.nonzero(kept(alone, table))[0].tolist() == sorted(expected)


def test_d2_selection_order_where_values_rise_and_fall():
    rng = np.random.default_rng(5)
    for _ in range(30):
        n, k = 40, 4
        x = rng.normal(size=n)
        neighbours = np.stack([rng.choice(np.delete(np.arange(n), i), k, replace=False) for i in range(n)])
        weights = rng.uniform(0, 1, (n, k))
        now, order = x.copy(), []
        for _ in range(n):
            best = max((i for i in range(n) if i not in order), key=lambda i: (now[i], -i))
            order.append(best)
            for j, weight in zip(neighbours[best], weights[best], strict=True):
                now[j] -= weight * now[best]
        assert select(x, neighbours, weights, n) == order


def test_nearest_and_cosine_pairs_against_brute_force():
    rng = np.random.default_rng(6)
    vectors = np.concatenate([sphere(rng, 500, 16), sphere(rng, 5, 16)[[0, 0, 0, 1, 1]]]).astype(np.float16)
    exact = vectors.astype(np.float64)
    squared = ((exact[:, None] - exact[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    found, distance, recall = nearest_neighbours(vectors, 4)
    assert recall == 1 and not (found == np.arange(505)[:, None]).any()
    assert np.allclose(distance, np.sort(squared, axis=1)[:, :4], atol=1e-6)
    assert np.allclose(distance, np.take_along_axis(squared, found, axis=1), atol=1e-6)
    _, _, recall = nearest_neighbours(vectors, 4, exact=100)
    assert recall > 0.8
    i, j = cosine_pairs(vectors, None, 0.6)
    near = np.argwhere(np.triu(exact @ exact.T, 1) >= 0.6)
    assert np.array_equal(np.stack([i, j], axis=1), near) and len(near) > 3
    i, j = cosine_pairs(vectors[:50], vectors[50:], 0.5)
    assert np.array_equal(np.stack([i, j], axis=1), np.argwhere(exact[:50] @ exact[50:].T >= 0.5))


def negative_loss(image, text, batches, tau):
    """The paper's formula for one division into batches, sample by sample."""
    result = np.zeros(len(image))
    for batch in batches:
        for i in batch:
            over_texts = sum(math.exp(image[i] @ text[j] / tau) for j in batch)
            over_images = sum(math.exp(image[j] @ text[i] / tau) for j in batch)
            result[i] = image[i] @ text[i] - tau / 2 * (math.log(over_texts) + math.log(over_images))
    return result


def test_negative_clip_loss_is_the_papers(monkeypatch):
    monkeypatch.setattr("winnow.curation.filters.neg_clip_loss._ROWS", 7)
    rng = np.random.default_rng(7)
    image, text = halves(sphere(rng, 50, 8)), halves(sphere(rng, 50, 8))
    divisions = [rng.permutation(50) for _ in range(3)]
    cut = [[order[at : at + 16] for at in range(0, 50, 16)] for order in divisions]
    expected = np.mean([negative_loss(image, text, batches, 0.05) for batches in cut], axis=0)
    found = neg_clip_loss(image.astype(np.float16), text.astype(np.float16), divisions, 0.05, 16)
    assert np.allclose(found, expected, atol=1e-5)
    # One batch of all is the CLIP loss itself: the mean is minus tau times it.
    import torch

    logits = torch.tensor(image @ text.T / 0.05)
    target = torch.arange(50)
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    whole = neg_clip_loss(image.astype(np.float16), text.astype(np.float16), [np.arange(50)], 0.05, 50)
    assert math.isclose(whole.mean(), -0.05 * float(loss), abs_tol=1e-5)


def test_negative_clip_loss_is_stable_at_small_temperatures():
    rng = np.random.default_rng(8)
    image = sphere(rng, 40, 8)
    text = np.concatenate([image[:20], sphere(rng, 20, 8)])
    table = pool(image, **{"clip.text": embeddings(text, mask=[False] * 39 + [True])})
    mask = kept(NegClipLoss(fraction=0.5, batch_size=16, batches=2), table)
    assert mask[:20].all() and mask.sum() == 21 and not mask[39]
    assert mask.tolist() == kept(NegClipLoss(keep=21, batch_size=16, batches=2), table).tolist()
    assert kept(NegClipLoss(threshold=0.0, batch_size=16, batches=2), table).sum() <= 21
    assert np.isfinite(neg_clip_loss(image, -image, [np.arange(40)], 1e-3, 40)).all()


@pytest.mark.parametrize("p", [2, "inf"])
def test_norm_sim_is_the_papers(p, tmp_path):
    rng = np.random.default_rng(9)
    vectors, aim = halves(sphere(rng, 90, 6)), halves(sphere(rng, 11, 6))
    expected = np.linalg.norm(vectors @ aim.T, ord=2 if p == 2 else np.inf, axis=1)
    threshold = float(np.sort(expected)[60] - 1e-4)
    target = Columns(pa.table({"clip.image": embeddings(aim)}))
    node = NormSim(target="t", p=p, threshold=threshold)
    assert kept(node, pool(vectors), targets={"t": target}).tolist() == (expected >= threshold).tolist()
    np.save(tmp_path / "aim.npy", aim.astype(np.float32))
    share = NormSim(target=str(tmp_path / "aim.npy"), p=p, fraction=1 / 3)
    assert share.targets() == ()
    assert kept(share, pool(vectors)).tolist() == (expected >= np.sort(expected)[::-1][30]).tolist()


def test_norm_sim_refuses_what_does_not_fit():
    vectors = sphere(np.random.default_rng(10), 9, 6)
    empty = Columns(pa.table({"clip.image": embeddings(vectors)}).slice(0, 0))
    with pytest.raises(WinnowError, match="no usable image"):
        kept(NormSim(target="t", fraction=0.5), pool(vectors), targets={"t": empty})
    other = Columns(pa.table({"clip.image": embeddings(sphere(np.random.default_rng(11), 9, 5))}))
    with pytest.raises(WinnowError, match="6 dimensions, the targets 5"):
        kept(NormSim(target="t", fraction=0.5), pool(vectors), targets={"t": other})


@pytest.mark.parametrize("power", [0, 0.5, 1])
@pytest.mark.parametrize("budget", [0, 1, 37, 250, 499, 500])
def test_quotas_sum_to_the_budget(power, budget):
    sizes = np.array([0, 3, 250, 47, 1, 199])
    quota = quotas(sizes, budget, power)
    assert quota.sum() == budget and (quota <= sizes).all() and (quota >= 0).all()
    low, high = 0.0, 500.0  # the real-valued c, by bisection
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(sizes, c * sizes.astype(float) ** power).sum() < budget else (low, c)
    share = np.where(sizes > 0, np.minimum(sizes, high * sizes.astype(float) ** power), 0)
    assert (np.abs(quota - share) < 1 + 1e-6).all()


def test_cluster_balanced_draws_evenly(monkeypatch):
    centroids = np.eye(8, dtype=np.float32)[:3]
    monkeypatch.setattr("winnow.curation.filters.cluster_balanced.train_centroids", lambda *args, **more: centroids)
    rng = np.random.default_rng(11)
    label = np.repeat([0, 1, 2], [200, 60, 20])
    vectors = np.eye(8)[label] + 0.02 * rng.normal(size=(280, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pool(vectors)
    mask = kept(ClusterBalanced(clusters=3, fraction=0.375), table)  # 105 = 20 + 42.5 + 42.5
    assert mask.sum() == 105 and sorted(np.bincount(label[mask])) == [20, 42, 43]
    mask = kept(ClusterBalanced(clusters=3, fraction=0.5, power=1), table)
    assert np.bincount(label[mask]).tolist() == [100, 30, 10]
    assert kept(ClusterBalanced(clusters=3, fraction=0.5, power=1, seed=1), table).tolist() != mask.tolist()


def test_random_draws_samples_independently():
    table = pa.table({"uid": uids(4000)})
    tenth, third = RandomFraction(0.1).mask(table, {}), RandomFraction(0.3).mask(table, {})
    assert abs(tenth.sum() - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9) and not (tenth & ~third).any()
    assert RandomFraction(0.3).mask(table.slice(1000, 500), {}).tolist() == third[1000:1500].tolist()
    both = (RandomFraction(0.3, seed=1).mask(table, {}) & third).sum()
    assert abs(both - 360) < 5 * math.sqrt(4000 * 0.09 * 0.91)


def test_samples_without_values_are_dropped():
    rng = np.random.default_rng(12)
    vectors = sphere(rng, 20, 4)
    gone = [True, *[False] * 18, True]
    table = pa.table(
        {
            "uid": uids(20),
            "clip.image": embeddings(vectors, gone),
            "clip.text": embeddings(vectors, gone),
            "clip.score": np.where(gone, np.nan, 0.3),
        }
    )
    target = {"t": Columns(pa.table({"clip.image": embeddings(vectors)}))}
    for node in (
        SemDeDup(clusters=2, fraction=1.0),
        D2Pruning(fraction=1.0),
        NegClipLoss(fraction=1.0),
        NormSim(target="t", fraction=1.0),
        ClusterBalanced(clusters=2, fraction=1.0),
    ):
        assert kept(node, table, targets=target).tolist() == [not g for g in gone], node


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (SemDeDup, {"clusters": 2}),
        (SemDeDup, {"clusters": 2, "epsilon": 0.1, "fraction": 0.5}),
        (SemDeDup, {"clusters": 2, "epsilon": 1.1}),
        (SemDeDup, {"clusters": 2, "epsilon": 0.1, "which_to_keep": "best"}),
        (D2Pruning, {}),
        (D2Pruning, {"fraction": 0}),
        (D2Pruning, {"fraction": 0.5, "features": "sound"}),
        (NegClipLoss, {"fraction": 0.5, "tau": 0}),
        (NegClipLoss, {"fraction": 0.5, "threshold": 1}),
        (NormSim, {"target": "t", "fraction": 0.5, "p": 3}),
        (ClusterBalanced, {"clusters": 2, "fraction": 2}),
        (RandomFraction, {"fraction": 0}),
    ],
)
def test_refused(kind, params):
    with pytest.raises(ParameterError):
        build(kind, params, kind.name)
