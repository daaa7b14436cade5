"""Doing things ahead of the one who wants them, in threads."""

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


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """`map(function, items)` by threads: results in order, at most twice as many underway as there are threads.

    Args:
        function: releases the interpreter's lock for most of its time (Arrow, NumPy, reading).
        items: taken as they are needed.
        threads: None for one a core.
    """
    threads = threads or cores()
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as workers:
        try:
            waiting.extend(workers.submit(function, item) for item in itertools.islice(source, 2 * threads))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(workers.submit(function, item) for item in itertools.islice(source, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
