import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests import drawing
from tests.pretrain.tiny import make_pool, uid
from winnow.infra.errors import WinnowError
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.sample import Sample
from winnow.infra.pool.uids import decode_uids, save_subset, times_listed
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.order import Order, epoch_order
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.sections import SourceConfig


def views(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    number = np.int64(sample.text.rsplit(" ", 1)[1])
    return {"number": number, "draw": np.int64(rng.integers(1 << 40)), "red": np.asarray(sample.image())[..., 0].mean()}


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


def test_images_go_with_their_captions(tmp_path: Path) -> None:
    samples = Samples(make_pool(tmp_path), None)
    for sample in samples.read(np.array([39, 0, 17, 3, 17])):
        red, green, blue = np.asarray(sample.image()).reshape(-1, 3).mean(0)
        colour = sample.text.split()[1]
        brightest = {"red": red, "green": green, "blue": blue}
        assert colour == ("grey" if max(red, green, blue) < 150 else max(brightest, key=brightest.__getitem__))


def test_a_subset_is_trained_on_as_often_as_it_lists(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    selected = [3, 5, 5, 8, 20, 39, 39, 39]
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(i) for i in selected])))
    step = seen(pool, 1, subset=str(tmp_path / "s.npy"), last=1)[0]
    assert sorted(step["number"]) == selected


def test_a_subset_of_another_pool_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(1), uid(1000)])))
    with pytest.raises(WinnowError, match="names 1 samples that are not in the pool"):
        Samples(pool, str(tmp_path / "s.npy"))
    save_subset(str(tmp_path / "empty.npy"), np.empty(0, "u8,u8"))
    with pytest.raises(WinnowError, match="no sample to train on"):
        Samples(pool, str(tmp_path / "empty.npy"))


def test_a_broken_image_is_replaced_by_the_next_in_the_order(tmp_path: Path) -> None:
    broken = (4, 11, 12)
    pool = make_pool(tmp_path, broken=broken)
    samples = Samples(pool, None)
    numbers = [int(sample.text.rsplit(" ", 1)[1]) for sample in samples.read(np.arange(40))]
    order = [numbers[i] for epoch in range(3) for i in epoch_order(40, 3, epoch)]
    expected = [next(n for n in order[i:] if n not in broken) for i in range(72)]
    for world in (1, 2):
        got = np.concatenate([step["number"] for step in seen(pool, world)])
        assert list(got) == expected
    with Batches(samples, views, seed=3, batch=8, last=9) as batches:
        list(batches)
    assert batches.replaced == sum(n in broken for n in order[:72])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pool_of_broken_images_is_an_error(num_workers: int, tmp_path: Path) -> None:
    samples = Samples(make_pool(tmp_path, count=4, broken=(0, 1, 2, 3)), None)
    with (
        pytest.raises(WinnowError, match="no image of the pool can be decoded") as error,
        Batches(samples, views, seed=0, batch=2, last=1, num_workers=num_workers) as batches,
    ):
        next(batches)
    assert "Traceback" not in str(error.value)


def test_weights_are_how_often_a_sample_is_seen() -> None:
    """By brute force over epochs: three sources, of weight 1, 2 and 0.3."""
    sizes, weights = [7, 5, 11], [1.0, 2.0, 0.3]
    order = Order(sizes, 5, weights)
    rest = round(0.3 * 11)
    assert order.epoch_size == 7 + 10 + rest
    numbers = order(np.arange(11 * order.epoch_size)).reshape(11, -1)
    for epoch in numbers:
        assert np.bincount(epoch, minlength=12)[:12].tolist() == [1] * 7 + [2] * 5
        assert len(set(epoch[epoch >= 12])) >= rest - 1  # at most one turn ends within an epoch
    by_turns = np.bincount(numbers.ravel(), minlength=23)[12:]
    assert by_turns.sum() == 11 * rest and by_turns.max() - by_turns.min() <= 1
    assert len({tuple(epoch) for epoch in numbers}) == 11


def test_the_order_of_sources_does_not_depend_on_where_it_is_asked() -> None:
    sizes, weights = [7, 5, 11], [1.0, 2.0, 0.3]
    whole = Order(sizes, 5, weights)(np.arange(200))
    asked = np.random.default_rng(0).permutation(200)
    piecemeal = Order(sizes, 5, weights)
    np.testing.assert_array_equal(np.concatenate([piecemeal(asked[i : i + 7]) for i in range(0, 200, 7)]), whole[asked])
    np.testing.assert_array_equal(Order([7, 5, 11], 5)(np.arange(200)), Order(23, 5)(np.arange(200)))
    assert (Order(sizes, 6, weights)(np.arange(200)) != whole).any()


def test_several_sources_in_any_number_of_processes(tmp_path: Path) -> None:
    """A pool, a subset of another by its samples' numbers, and a third half as often."""
    pools = []
    for name, first in (("a", 0), ("b", 1000), ("c", 2000)):
        (tmp_path / name).mkdir()
        pools.append(make_pool(tmp_path / name, count=20, first=first))
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(1003), uid(1004)])))
    more = (
        SourceConfig(pool=pools[1], subset=str(tmp_path / "s.npy"), weight=3),
        SourceConfig(pool=pools[2], weight=0.5),
    )

    def numbers(world: int, num_workers: int) -> list[list[int]]:
        samples, parts = Samples(pools[0], None, more), []
        for rank in range(world):
            place = {"rank": rank, "world": world, "last": 18, "num_workers": num_workers}
            with Batches(samples, views, seed=3, batch=4, **place) as batches:
                parts.append([batch["number"] for batch in batches])
        return [np.concatenate(step).tolist() for step in zip(*parts, strict=True)]

    one = numbers(1, 1)
    assert numbers(2, 3) == numbers(4, 0) == one
    flat = [n for step in one for n in step]
    for epoch in (flat[:36], flat[36:]):
        counts = {n: epoch.count(n) for n in set(epoch)}
        assert {n: c for n, c in counts.items() if n < 2000} == {**dict.fromkeys(range(20), 1), 1003: 3, 1004: 3}
    assert sorted(n for n in flat if n >= 2000) == list(range(2000, 2020))  # two epochs, each with another half


def test_every_sample_once_an_epoch_whatever_the_processes(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, count=24, shards=1)
    for world, num_workers in ((1, 0), (2, 3), (4, 2), (8, 1)):  # more processes than shards, too
        parts = []
        for rank in range(world):
            with Batches(
                Samples(pool, None), views, seed=1, batch=8, rank=rank, world=world, last=9, num_workers=num_workers
            ) as batches:
                parts += [(step, n) for step, batch in enumerate(batches) for n in batch["number"]]
        for epoch in range(3):
            seen_then = [n for step, n in parts if step // 3 == epoch]
            assert sorted(seen_then) == list(range(24))


def bytes_read() -> int:
    """What this process has read through system calls so far, all threads together."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by Linux's /proc")
def test_a_tenth_of_a_pool_costs_at_most_15_percent_of_its_bytes(tmp_path: Path) -> None:
    """The pool's tables and subset included, over one epoch; images of some 8 KiB."""
    source = tmp_path / "shards"
    numbers = []
    for shard in range(4):
        items = []
        for i in range(shard * 100, shard * 100 + 100):
            item = drawing.sample(i)
            item["members"]["jpg"] = drawing.draw_image((120, 90, 60), i, size=(320, 240))
            items.append(item)
            numbers.append(i)
        drawing.write_tar(source / f"{shard:05d}.tar", items)
        drawing.write_parquet(source / f"{shard:05d}.parquet", items)
    execute(IndexStage((str(source),), str(tmp_path / "pool")), SerialExecutor())
    total = sum(path.stat().st_size for path in source.iterdir())
    kept = np.random.default_rng(0).choice(numbers, 40, replace=False)
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([drawing.uid_of(int(i)) for i in kept])))

    def epoch(subset: str | None, steps: int) -> int:
        before = bytes_read()
        with Batches(Samples(str(tmp_path / "pool"), subset), views, seed=0, batch=20, last=steps) as batches:
            assert sum(len(batch["number"]) for batch in batches) == steps * 20
        return bytes_read() - before

    epoch(None, 2)  # what is imported on the way
    assert epoch(str(tmp_path / "s.npy"), 2) <= 0.15 * total
    assert epoch(None, 20) > 0.7 * total


def test_a_subset_of_another_pool_names_what_is_missing(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    strangers = sorted(uid(i) for i in range(1000, 1005))
    save_subset(str(tmp_path / "s.npy"), decode_uids(pa.array([uid(1), *strangers])))
    with pytest.raises(WinnowError) as error:
        Samples(pool, str(tmp_path / "s.npy"))
    assert f"names 5 samples that are not in the pool: {', '.join(strangers[:3])}, …" in str(error.value)


def test_uids_that_share_their_first_half_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    uids = np.zeros(300, "u8,u8")
    uids["f0"], uids["f1"] = rng.integers(0, 10, 300), rng.integers(0, 40, 300)
    distinct = np.unique(uids[:100])
    counts = rng.integers(1, 5, len(distinct))
    _, times = times_listed(uids, distinct, counts)
    by_uid = {value.tobytes(): count for value, count in zip(distinct, counts, strict=True)}
    assert times.tolist() == [by_uid.get(value.tobytes(), 0) for value in uids]


def test_labels_come_with_their_samples(tmp_path: Path) -> None:
    items = [drawing.sample(i) for i in range(12)]
    for i, item in enumerate(items):
        item["members"]["cls"] = str(i % 5).encode()
    drawing.write_tar(tmp_path / "shards" / "00000.tar", items)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    samples = Samples(str(tmp_path / "pool"), None)
    numbers = np.array([7, 0, 11, 3])
    for sample in samples.read(numbers):
        number = int(sample.text.rsplit(" ", 1)[1])
        assert sample.label == number % 5 and sample.member("cls") == str(number % 5).encode()
        assert sample.key == items[number]["key"] and sample.member("txt").decode() == sample.text
    (tmp_path / "other").mkdir()
    other = Samples(make_pool(tmp_path / "other"), None)
    assert [sample.label for sample in other.read(np.array([0, 1]))] == [None, None]


def test_more_workers_than_cores_are_not_warned_of() -> None:
    """torch suggests a number; the user's is meant."""
    code = "import os; from winnow.pretrain.data.loader import Batches\n"
    code += "class Samples:\n    def order(self, seed): return None\n"
    code += "n = os.cpu_count() + 1\nwith Batches(Samples(), None, seed=0, batch=1, last=n, num_workers=n): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
