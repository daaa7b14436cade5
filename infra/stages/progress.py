"""Progress a person can read and a program can parse: lines on stderr and JSON lines in the run's `log.jsonl`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, TextIO

from winnow.infra.io import storage


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
    """Where a run says what it does.

    Args:
        url: local directory for `log.jsonl`; None to keep no file.
        stream: for people; None for silence.
    """

    def __init__(self, url: str | None = None, stream: TextIO | None = sys.stderr) -> None:
        self.stream = stream
        self.file: TextIO | None = None
        if url is not None and storage.is_local(url):
            storage.make_dir(url)
            path = storage.local_path(storage.join(url, "log.jsonl"))
            self.file = path.open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    def event(self, **facts: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"time": round(time.time(), 3), **facts}, ensure_ascii=False) + "\n")
            self.file.flush()


@dataclass
class Counts:
    units: int = 0
    items: int = 0
    bytes: int = 0
    skipped: int = 0


class StageProgress:
    """Counts of one stage as it runs; prints a line at most every `every` seconds and one at the end."""

    def __init__(self, log: RunLog, label: str, units: int, items: int, every: float = 5.0) -> None:
        self.log, self.label, self.units, self.items, self.every = log, label, units, items, every
        self.counts = Counts()
        self.started = self.last = time.monotonic()

    def add(self, *, items: int, size: int, skipped: int) -> None:
        self.counts.units += 1
        self.counts.items += items
        self.counts.bytes += size
        self.counts.skipped += skipped
        self.tick()

    def tick(self, notes: str = "") -> None:
        """Say where things stand, if it is time to."""
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        self.log.say(self.line() + (f"  {notes}" if notes else ""))
        self.log.event(event="progress", stage=self.label, **self.facts())

    def facts(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {
            "units": self.counts.units,
            "of": self.units,
            "items": self.counts.items,
            "bytes": self.counts.bytes,
            "skipped": self.counts.skipped,
            "seconds": round(seconds, 3),
            "items_per_second": round(self.counts.items / seconds, 1) if seconds > 0 else 0.0,
        }

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        parts = [f"{self.label:<24} {self.counts.units}/{self.units}"]
        if self.counts.items:
            parts.append(f"{self.counts.items:,} items {self.counts.items / max(seconds, 1e-9):,.0f}/s")
        if self.counts.bytes:
            parts.append(f"{size_text(self.counts.bytes)} written")
        if 0 < self.counts.units < self.units:
            parts.append(f"{clock(seconds / self.counts.units * (self.units - self.counts.units))} left")
        if self.counts.skipped:
            parts.append(f"{self.counts.skipped} skipped")
        return "  ".join([*parts, f"[{clock(seconds)}]"])


_notes_lock = threading.Lock()


def write_note(url: str, text: str) -> None:
    """Leave a one-line note on how a long unit is doing, for whoever drives it (a training loop: step, loss, speed).

    Notes are files, so that a worker on another node can leave one; a failure to write is of no consequence.
    """
    try:
        with _notes_lock:
            storage.write_bytes(url, text.encode())
    except OSError:
        return


def read_note(url: str) -> str:
    try:
        return storage.read_bytes(url).decode() if storage.exists(url) else ""
    except Exception:  # a note half-gone is no reason to stop
        return ""


def env_flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
