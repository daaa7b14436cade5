from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.errors import WinnowError
from infra.pictures import decode_picture
from infra.uids import decode_uids, save_subset
from pretrain.data import Batches, Order, Samples, epoch_order
from pretrain.objectives.base import Sample
from tests.pretrain.tiny import make_pool, uid


def views(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    number = np.int64(sample.text.rsplit(" ", 1)[1])
    return {"number": number, "draw": np.int64(rng.integers(1 << 40)), "red": np.asarray(sample.image)[..., 0].mean()}


def seen(pool: str, world: int, *, subset: str | None = None, first: int = 0, last: int = 9) -> list[dict]:
    """The global batches, put together from those of all processes."""
    samples = Samples(pool, subset)
    parts = []
    for rank in range(world):
        with Batches(samples, views, seed=3, batch=8, rank=rank, world=world, first=first, last=last) as batches:
            parts.append(list(batches))
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = {(s, e): tuple(epoch_order(50, s, e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert orders[1, 2] == tuple(epoch_order(50, 1, 2))


def test_the_order_is_the_epochs_one_after_the_other() -> None:
    expected = np.concatenate([epoch_order(7, 5, epoch) for epoch in range(4)])
    order = Order(7, 5)
    np.testing.assert_array_equal(order(np.arange(28)), expected)
    np.testing.assert_array_equal(order(np.arange(3, 12)), expected[3:12])


def test_batches_do_not_depend_on_the_number_of_processes_or_the_start(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    one = seen(pool, 1)
    flat = np.concatenate([step["number"] for step in one])
    assert sorted(flat[:40]) == list(range(40))  # 9 steps of 8: one epoch of 40 and part of the next
    assert len(set(np.concatenate([step["draw"] for step in one]))) == 72
    for other in (seen(pool, 2), seen(pool, 4), seen(pool, 2, last=5) + seen(pool, 2, first=5)):
        assert len(other) == 9
        for a, b in zip(one, other, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


def test_pictures_go_with_their_captions(tmp_path: Path) -> None:
    samples = Samples(make_pool(tmp_path), None)
    for data, text in samples.read(np.array([39, 0, 17, 3, 17])):
        red, green, blue = np.asarray(decode_picture(data)).reshape(-1, 3).mean(0)
        colour = text.split()[1]
        brightest = {"red": red, "green": green, "blue": blue}
        assert colour == ("grey" if max(red, green, blue) < 150 else max(brightest, key=brightest.__getitem__))


def test_a_subset_is_trained_on_as_often_as_it_lists(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    chosen = [3, 5, 5, 8, 20, 39, 39, 39]
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(i) for i in chosen])))
    step = seen(pool, 1, subset=str(tmp_path / "s.npy"), last=1)[0]
    assert sorted(step["number"]) == chosen


def test_a_subset_of_another_pool_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(1), uid(1000)])))
    with pytest.raises(WinnowError, match="names 1 samples that the pool has not"):
        Samples(pool, str(tmp_path / "s.npy"))
    save_subset(str(tmp_path / "empty.npy"), np.empty(0, "u8,u8"))
    with pytest.raises(WinnowError, match="no sample to train on"):
        Samples(pool, str(tmp_path / "empty.npy"))


def test_a_broken_picture_is_replaced_by_the_next_in_the_order(tmp_path: Path) -> None:
    broken = (4, 11, 12)
    pool = make_pool(tmp_path, broken=broken)
    samples = Samples(pool, None)
    numbers = [int(text.rsplit(" ", 1)[1]) for _, text in samples.read(np.arange(40))]
    order = [numbers[i] for epoch in range(3) for i in epoch_order(40, 3, epoch)]
    expected = [next(n for n in order[i:] if n not in broken) for i in range(72)]
    for world in (1, 2):
        got = np.concatenate([step["number"] for step in seen(pool, world)])
        assert list(got) == expected
    with Batches(samples, views, seed=3, batch=8, last=9) as batches:
        list(batches)
    assert batches.replaced == sum(n in broken for n in order[:72])


def test_a_pool_of_broken_pictures_is_an_error(tmp_path: Path) -> None:
    samples = Samples(make_pool(tmp_path, count=4, broken=(0, 1, 2, 3)), None)
    with pytest.raises(WinnowError, match="no picture"), Batches(samples, views, seed=0, batch=2, last=1) as batches:
        next(batches)
