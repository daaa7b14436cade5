"""`winnow doctor`: what on this machine keeps Winnow from working, or makes it slow."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import winnow
from winnow.infra.io.prefetch import cores

PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "diffusers",
    "deepspeed",
    "ray",
    "faiss-cpu",
    "pyarrow",
    "webdataset",
    "numpy",
)


class Finding(NamedTuple):
    """One line: what was looked at, how it is ("ok", "warn", "fail"), what to do."""

    subject: str
    level: str
    text: str

    def line(self) -> str:
        return f"{self.level:<5} {self.subject:<12} {self.text}"


def examine() -> list[Finding]:
    """Look at everything. Imports nothing heavy but torch."""
    return [_python(), _bytecode(), _one_copy(), *_packages(), *_devices(), *_space()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok" if good else "fail", text if good else f"{text}; 3.11 or newer is needed")


def _bytecode() -> Finding:
    """Each worker process imports torch and more; compiling them each time takes three times as long."""
    spec = importlib.util.find_spec("torch")
    known = spec is None or spec.cached is None or Path(spec.cached).exists()
    if known or not sys.dont_write_bytecode:
        return Finding("bytecode", "ok", "kept" if known else "will be kept")
    return Finding("bytecode", "warn", "not kept: every process compiles torch again; unset PYTHONDONTWRITEBYTECODE")


def _one_copy() -> Finding:
    """A second copy on Python's path is the one that runs in another folder or with another PYTHONPATH."""
    folders = [Path(folder or ".") / "winnow" for folder in sys.path]
    homes = dict.fromkeys(folder.resolve() for folder in folders if (folder / "__init__.py").exists())
    used = Path(winnow.__file__).resolve().parent
    others = [str(home) for home in homes if home != used]
    if others:
        return Finding("winnow", "warn", f"{used}; there is another copy in {', '.join(others)}")
    return Finding("winnow", "ok", f"{winnow.__version__} in {used}")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            gpu = name == "faiss-cpu" and importlib.util.find_spec("faiss") is not None
            findings.append(Finding(name, "ok", "faiss-gpu") if gpu else Finding(name, "fail", "not installed"))
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        findings.append(Finding("torchvision", "fail", f"does not match torch ({error})"))
    return findings


def _devices() -> list[Finding]:
    cpu = Finding("cpu", "ok", f"{cores()} cores")
    try:
        import torch
    except ImportError:
        return [cpu]
    if not torch.cuda.is_available():
        return [cpu, Finding("gpu", "warn", "none; everything runs on the CPU, training slowly")]
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return [cpu, Finding("gpu", "ok", f"{names}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")]


def _space() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    findings = [Finding("disk", "ok" if free > 5e9 else "warn", f"{free / 1e9:.0f} GB free here")]
    if (shm := Path("/dev/shm")).exists():
        free = shutil.disk_usage(shm).free
        level, end = ("ok", "") if free > 1e9 else ("warn", "; Ray will spill to disk")
        findings.append(Finding("shm", level, f"{free / 1e9:.1f} GB shared memory{end}"))
    return findings
