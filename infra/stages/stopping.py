"""Stopping by a signal: a training saves a checkpoint first, and everything else ends at once."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from winnow.infra.io import storage

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE_LIMIT = 3.0  # seconds in which a training in other processes must notice the request; one that starts does not
SAVE_LIMIT = 60.0  # seconds for the step at hand and its checkpoint
POLL = 0.5  # seconds between looks for a request

_SAYS = b"\nwinnow: stopping. A training in progress saves a checkpoint first; a second signal ends it at once.\n"
_received: list[int] = []  # signals of this process, in order
_running: set[str] = set()  # URLs of the requests that trainings in other processes look for
_asked: set[str] = set()  # those that have been made
_abandoned: set[str] = set()  # those that were not waited for; threads of this process may still wait for them


def status() -> int:
    """The exit status of a process that was stopped, as shells have it."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def leave() -> NoReturn:
    """End a process that was stopped, though threads of it wait for processes that did not stop in time."""
    if _abandoned:
        sys.stdout.flush()
        os._exit(status())
    raise SystemExit(status())


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Handler of the command line: the first signal raises KeyboardInterrupt, a second ends the process."""
    _received.append(number)
    if len(_received) > 1:
        os._exit(status())
    os.write(2, _SAYS)  # a print within a print is refused
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block in which SIGINT and SIGTERM are answered by `interrupt`."""
    _received.clear()
    with _handled(interrupt):
        yield


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """A block in which the first signal is only noticed, by the function that this yields; it must then end itself.

    A second signal interrupts it, and so does its not ending within `SAVE_LIMIT` seconds. Outside the main thread there
    are no signals to notice.
    """
    seen: list[int] = []
    timer = threading.Timer(SAVE_LIMIT, _thread.interrupt_main)
    timer.daemon = True

    def notice(number: int, frame: FrameType | None) -> None:
        stack.close()
        seen.append(number)
        _received.append(number)
        timer.start()
        os.write(2, _SAYS)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_handled(notice))
        try:
            yield lambda: bool(seen)
        finally:
            timer.cancel()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    here = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in here}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def requestable(url: str) -> Iterator[None]:
    """A block that waits for a training in other processes, which stops when a file is at `url`.

    Raises KeyboardInterrupt at its end when `stop_running` has asked for that.
    """
    storage.remove(url)
    _asked.discard(url)
    _running.add(url)
    try:
        yield
    finally:
        _running.discard(url)
        storage.remove(url)
    if url in _asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def requested(url: str) -> Iterator[Callable[[], bool]]:
    """For a training: yields whether there has been a request at `url`, which is removed when it is seen."""
    seen, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(POLL if storage.is_local(url) else 4 * POLL):
            with contextlib.suppress(OSError):
                if storage.exists(url):
                    seen.set()
                    storage.remove(url)
                    return

    threading.Thread(target=look, name="stop request", daemon=True).start()
    try:
        yield seen.is_set
    finally:
        ended.set()


def stop_running(ended: Callable[[], bool]) -> bool:
    """Ask the trainings in other processes to stop, and wait for them. Returns whether they have.

    Those that have not noticed within `NOTICE_LIMIT` seconds, because they are still starting, are not waited for.
    `ended` says whether all have ended.
    """
    urls = set(_running)
    _asked.update(urls)
    for url in urls:
        storage.write_bytes(url, b"")
    started = time.monotonic()
    while not ended():
        noticed = any(not storage.exists(url) for url in urls & _running)
        if time.monotonic() - started > (SAVE_LIMIT if noticed else NOTICE_LIMIT):
            _abandoned.update(urls & _running)
            return False
        time.sleep(0.1)
    return True
