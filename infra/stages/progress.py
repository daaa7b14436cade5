"""Progress for people (lines on stderr, or a live bar on a terminal) and for programs (JSON lines in `log.jsonl`)."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from winnow.infra.errors import UsageError
from winnow.infra.io import storage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def clock(seconds: float) -> str:
    """93 -> "1:33"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size_text(count: float) -> str:
    """1536 -> "1.5 KB" (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class RunLog:
    """Reports what a run does: lines (on a terminal, a live bar) for people, and JSON lines in a file.

    Args:
        url: local directory for `log.jsonl`; None to keep no file.
        stream: for people; None for silence.
        steps: which stage of how many is running; set before each stage of a run.
    """

    def __init__(
        self, url: str | None = None, stream: TextIO | None = sys.stderr, steps: tuple[int, int] | None = None
    ) -> None:
        self.stream, self.steps = stream, steps
        self.console = _console(stream)
        self.file: TextIO | None = None
        if url is not None and storage.is_local(url):
            storage.make_dir(url)
            try:
                self.file = (storage.local_path(url) / "log.jsonl").open("a", encoding="utf-8")
            except OSError as error:
                do = "Give a directory that you may write to."
                raise UsageError(f"cannot be written to ({error.strerror})", where=url, do=do) from None

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def event(self, **facts: Any) -> None:
        if self.file is not None:
            self.file.write(storage.json_line({"time": round(time.time(), 3), **facts}))
            self.file.flush()


def _console(stream: TextIO | None) -> Console | None:
    """Rich's console on a terminal that can redraw a line; None elsewhere."""
    if stream is None or not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream)
    return None if console.is_dumb_terminal else console


class StageProgress:
    """Counts of one stage as it runs. Reports them at most every `every` seconds; on a terminal, draws a live bar,
    which the end of the `with` block removes."""

    def __init__(self, log: RunLog, label: str, units: int, items: int, every: float = 5.0) -> None:
        self.log, self.label, self.units, self.items, self.every = log, label, units, items, every
        self.done = self.n_items = self.n_bytes = self.n_skipped = 0
        self.started = self.last = time.monotonic()
        self._bar: Progress | None = None
        self._notes = ""

    def __enter__(self) -> StageProgress:
        if self.log.console is not None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            text = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("step", "state", "notes")]
            columns = text[0], BarColumn(), text[1], TimeElapsedColumn(), TimeRemainingColumn(), text[2]
            self._bar = Progress(*columns, console=self.log.console, transient=True, refresh_per_second=4)
            step = "[{}/{}] ".format(*self.log.steps) if self.log.steps else ""
            self._bar.add_task("", total=self.units, step=step + self.label, state="", notes="")
            self._draw()
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self) -> None:
        if self._bar is not None:
            state = "  ".join([f"{self.done}/{self.units}", *self._rates()])
            self._bar.update(self._bar.task_ids[0], completed=self.done, state=state, notes=self._notes)

    def add(self, *, items: int, size: int, skipped: int) -> None:
        self.done += 1
        self.n_items += items
        self.n_bytes += size
        self.n_skipped += skipped
        self.tick(self._notes if self._bar is not None else "")

    def tick(self, notes: str = "") -> None:
        """Update the bar, and report if it is time to."""
        self._notes = notes
        self._draw()
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        if self._bar is None:
            self.log.say(self.line() + (f"  {notes}" if notes else ""))
        self.log.event(event="progress", stage=self.label, **self.facts())

    def facts(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        counts = {"units": self.done, "of": self.units, "items": self.n_items, "bytes": self.n_bytes}
        rate = round(self.n_items / seconds, 1) if seconds > 0 else 0.0
        return counts | {"skipped": self.n_skipped, "seconds": round(seconds, 3), "items_per_second": rate}

    def _rates(self) -> list[str]:
        seconds = time.monotonic() - self.started
        parts = []
        if self.n_items:
            parts.append(f"{self.n_items:,} items {self.n_items / max(seconds, 1e-9):,.0f}/s")
        if self.n_bytes:
            parts.append(f"{size_text(self.n_bytes)} written")
        return [*parts, f"{self.n_skipped} skipped"] if self.n_skipped else parts

    def line(self) -> str:
        seconds, rates = time.monotonic() - self.started, self._rates()
        if 0 < self.done < self.units:
            left = f"{clock(seconds / self.done * (self.units - self.done))} left"
            rates.insert(len(rates) - bool(self.n_skipped), left)
        return "  ".join([f"{self.label:<24} {self.done}/{self.units}", *rates, f"[{clock(seconds)}]"])


_notes_lock = threading.Lock()


def write_note(url: str, text: str) -> None:
    """Write a one-line note on the progress of a long unit, for the driver (of a training: step, loss, speed).

    Notes are files, so that a worker on another node can write one. A failure to write is ignored.
    """
    try:
        with _notes_lock:
            storage.write_bytes(url, text.encode())
    except OSError:
        return


def read_note(url: str) -> str:
    try:
        return storage.read_bytes(url).decode() if storage.exists(url) else ""
    except Exception:  # a damaged note is no reason to stop
        return ""
