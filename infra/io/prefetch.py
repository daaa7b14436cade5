"""Computing results before they are needed, in threads."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def prefetch(
    function: Callable[[T], R], items: Iterable[T], threads: int | None = None, depth: int | None = None
) -> Iterator[R]:
    """`map(function, items)` in threads. Results come in order; each is released once it has been yielded.

    Args:
        function: should release the GIL for most of its time (Arrow, NumPy, image decoding, reading files).
        items: consumed as they are needed.
        threads: None for one a core; 0 to compute in the calling thread.
        depth: how many results may be computed or waiting at once; twice the number of threads by default.

    Example:
        >>> list(prefetch(len, ["a", "bc"], threads=2))
        [1, 2]
    """
    threads = cores() if threads is None else threads
    if not threads:
        yield from map(function, items)
        return
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as workers:
        try:
            waiting.extend(workers.submit(function, item) for item in itertools.islice(source, depth or 2 * threads))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(workers.submit(function, item) for item in itertools.islice(source, 1))
                yield result
                del result  # not kept alive while the next one is awaited
        finally:
            for future in waiting:
                future.cancel()
