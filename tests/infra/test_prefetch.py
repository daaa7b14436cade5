"""Prefetching: the order of `map`, a bounded number underway, and threads that end with the consumer."""

import threading
import time

import pytest

from winnow.infra.io.prefetch import prefetch


@pytest.mark.parametrize("threads", [None, 0, 1, 3])
def test_results_come_in_order(threads):
    def slow(number):
        time.sleep(0.002 * (5 - number % 5))
        return number * number

    assert list(prefetch(slow, range(20), threads)) == [n * n for n in range(20)]


@pytest.mark.parametrize(("threads", "depth", "bound"), [(2, None, 4), (2, 3, 3), (1, 7, 7)])
def test_only_so_many_items_are_taken(threads, depth, bound):
    taken = []
    results = prefetch(lambda item: item, (taken.append(i) or i for i in range(50)), threads, depth)
    for done in range(1, 4):
        next(results)
        assert len(taken) == bound + done
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_reaches_the_consumer():
    def fail(number):
        if number == 3:
            raise OSError("no")
        return number

    results = prefetch(fail, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no"):
        next(results)
