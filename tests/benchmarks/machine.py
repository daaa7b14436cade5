"""What a benchmark's table says of the machine, and how a process is measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from winnow.infra.io.prefetch import cores


def machine() -> str:
    """One line: date, processor, cores, memory, Python."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = platform.python_version()
    return f"{datetime.date.today()}, {name}, {cores()} cores, {memory:.0f} GiB, Python {python}"


@dataclass(frozen=True)
class Run:
    """A process that has ended: wall-clock seconds from its start to its end, CPU seconds, and peak memory in MB (10^6)
    of its largest process, itself or one it started and waited for."""

    wall: float
    cpu: float
    memory: float


def run(command: Sequence[str]) -> Run:
    """Run a command to its end. Raises RuntimeError when it fails."""
    # Without bytecode on disk every process compiles all of torch again.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise RuntimeError(said)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def winnow(*args: object) -> list[str]:
    """The command line of `winnow`, by this interpreter."""
    return [str(Path(sys.executable).with_name("winnow")), *map(str, args)]


def table(title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a title and the machine; the first row is the header."""
    cells = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print(f"\n{title}\n{machine()}\n")
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()
