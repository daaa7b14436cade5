"""Checkpoints that an interrupted training resumes from, written by a thread while the training goes on."""

from __future__ import annotations

import errno
import re
import threading
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.pretrain.checkpoint.load import local_copy
from winnow.pretrain.distributed import broadcast_object, rank
from winnow.pretrain.engine.engine import Engine
from winnow.pretrain.objectives.base import Objective

RESUME = "resume"
STATE = "state.safetensors"
LISTING = "checkpoint.json"
_ELSEWHERE = "Train in another directory, or remove this one."
_LISTED = ("step", "objective", "scaler", "state", "files")


@dataclass(frozen=True)
class Saved:
    """A checkpoint: number of steps done, `Engine.state`, and the state of the log."""

    step: int
    tensors: dict[str, torch.Tensor]
    scaler: dict[str, Any]
    state: dict[str, Any]


class Resume:
    """The checkpoints of one training, each a folder `<out>/resume/step-NNNNNNNN`.

    `state.safetensors` has every tensor whole and by name, so that any number of processes, under any ZeRO stage, can
    go on from it; `checkpoint.json`, written last, says what it is of, and its digest. A folder without it is not a
    checkpoint. One whose content no longer has that digest is skipped in favour of the one before.

    The first process writes, in a thread: `save` copies the state and returns. Errors of the thread are raised by
    the next call.

    Args:
        out: URL of the training's directory.
        key: of the training's content; checkpoints of another key are ignored, and removed after the next is written.
        objective: its name.
        keep: how many checkpoints are kept.
    """

    def __init__(self, out: str, key: str, objective: str, keep: int) -> None:
        self.url, self.key, self.objective, self.keep = storage.join(out, RESUME), key, objective, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._last = 0

    def __enter__(self) -> Resume:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._join()
        if kind is None:
            self.check()

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """All processes call it, with the same `state` (JSON values)."""
        self.wait()
        tensors, scaler = engine.state()
        if rank() == 0:
            saved = Saved(step, tensors, scaler, state)
            self._thread = threading.Thread(target=self._background, args=(saved,), name="checkpoint")
            self._thread.start()

    def check(self) -> None:
        """Raise the error of the background thread, if there was one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Block until the pending checkpoint is written."""
        self._join()
        self.check()

    def load(self, objective: Objective) -> tuple[Saved | None, list[str]]:
        """The latest whole checkpoint, its weights loaded into the objective; all processes call it.

        Returns:
            (the checkpoint, or None when there is none; which were skipped, and why).

        Raises:
            WinnowError: the checkpoint is of another objective, or of networks of other shapes.
        """
        box: list[Any] = [None, []]
        if rank() == 0:
            for tag, listing in reversed(self._whole(box[1])):
                if fault := self._fault(tag, listing):
                    box[1].append(f"{tag} is damaged ({fault})")
                else:
                    box[0] = listing
                    break
        listing, notes = broadcast_object(box)
        if listing is None:
            return None, notes
        self._last = listing["step"]
        where = storage.join(self.url, _tag(listing["step"]))
        if listing["objective"] != self.objective:
            what = f"is a checkpoint of {listing['objective']}, the training is of {self.objective}"
            raise WinnowError(what, where=where, do=_ELSEWHERE)
        with local_copy(storage.join(where, STATE)) as path:
            tensors = load_file(path)
        weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        _check_shapes(weights, objective, where)
        objective.load_state_dict(weights)
        return Saved(listing["step"], tensors, listing["scaler"], listing["state"]), notes

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _background(self, saved: Saved) -> None:
        try:
            self._write(saved)
        except Exception as error:
            self._error = self._no_space(saved) if disk_is_full(error) else error

    def _no_space(self, saved: Saved) -> WinnowError:
        size = sum(value.nbytes for value in saved.tensors.values())
        since = f"step {self._last}" if self._last else "the start"
        return WinnowError(
            f"no space left for the checkpoint of step {saved.step} ({size / 2**20:,.1f} MiB)",
            where=self.url,
            do=f"Free some and run again: the training goes on from {since}.",
        )

    def _write(self, saved: Saved) -> None:
        tag, local = _tag(saved.step), storage.is_local(self.url)
        folder = storage.join(self.url, f".{tag}.part" if local else tag)
        storage.remove(folder)
        try:
            with storage.writing(storage.join(folder, STATE)) as path:
                save_file(saved.tensors, path)
            content = {"key": self.key, "objective": self.objective, "step": saved.step, "state": saved.state}
            content |= {"scaler": saved.scaler, "files": {STATE: storage.digest_file(storage.join(folder, STATE))}}
            storage.write_json(storage.join(folder, LISTING), content)
        except BaseException:
            storage.remove(folder)
            raise
        if local:
            target = storage.local_path(storage.join(self.url, tag))
            storage.remove(str(target))
            storage.local_path(folder).rename(target)
        self._last = saved.step
        kept = {name for name, _ in self._whole([])[-self.keep :]}
        for name in storage.list_names(self.url):
            if name not in kept:
                storage.remove(storage.join(self.url, name))

    def _whole(self, notes: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """This training's checkpoints by their listings, oldest first; `notes` gets what cannot be read."""
        found = []
        for tag in storage.list_names(self.url):
            if not re.fullmatch(r"step-\d{8,}", tag):
                continue
            url = storage.join(self.url, tag, LISTING)
            try:
                listing = storage.read_json(url)
                if listing["key"] == self.key:
                    found.append((tag, {name: listing[name] for name in _LISTED}))
            except (WinnowError, KeyError, TypeError):
                notes.append(f"{tag} is damaged ({LISTING})")
        return sorted(found, key=lambda entry: entry[1]["step"])

    def _fault(self, tag: str, listing: dict[str, Any]) -> str | None:
        """The file that is not what the listing says, or None."""
        for name, digest in listing["files"].items():
            url = storage.join(self.url, tag, name)
            if not storage.exists(url) or storage.digest_file(url) != digest:
                return str(name)
        return None


def disk_is_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (isinstance(error, SafetensorError) and "os error 28" in str(error))


def _tag(step: int) -> str:
    return f"step-{step:08d}"


def _check_shapes(weights: dict[str, torch.Tensor], objective: Objective, where: str) -> None:
    wanted = {name: tuple(value.shape) for name, value in objective.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted == found:
        return
    name, *others = dict.fromkeys(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
    there, here = (str(list(shapes[name])) if name in shapes else "none" for shapes in (found, wanted))
    what = f"is a checkpoint of other networks: {name} is {there} there and {here} here"
    raise WinnowError(what + (f", and {len(others)} more differ" if others else ""), where=where, do=_ELSEWHERE)
