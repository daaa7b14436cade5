"""Checkpoints: what users load (safetensors and configs), and what an interrupted training resumes from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from infra import storage
from infra.errors import WinnowError
from pretrain.config import PretrainConfig
from pretrain.engine import Engine

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
OPEN_CLIP = "open_clip_config.json"
RESUME = "resume"
_LATEST = "latest.json"


def export(engine: Engine, config: PretrainConfig, out: str, training: dict[str, Any]) -> None:
    """Write the encoder to the directory `out`; all processes call it, the first writes, `config.json` last.

    `model.safetensors` has open_clip's own names, so the directory is also an open_clip "local-dir:".

    Args:
        engine: whose objective's encoder is written.
        config: the training's.
        out: URL of the directory.
        training: facts about the training for `config.json`; JSON values that are the same on every run.
    """
    encoder = engine.objective.encoder()
    with engine.whole(list(encoder.parameters())):
        if dist.get_rank() == 0:
            weights = {name: value.detach().cpu().contiguous() for name, value in engine.objective.weights().items()}
            with storage.writing(storage.join(out, WEIGHTS)) as path:
                save_file(weights, path, metadata={"format": "pt"})
            model, preprocess = config.model.open_clip_config(), engine.objective.preprocess()
            clip = {"model_cfg": model, "preprocess_cfg": preprocess}
            storage.write_json(storage.join(out, OPEN_CLIP), clip)
            content = {
                "format": 1,
                "objective": {"name": config.objective_name, "params": config.objective_params},
                "model": model,
                "preprocess": preprocess,
                "training": {"config": config.identity(), **training},
            }
            storage.write_json(storage.join(out, CONFIG), content)
    dist.barrier()


class Resume:
    """The DeepSpeed checkpoints of one training, below `<out>/resume`.

    A checkpoint counts once `latest.json`, replaced atomically after it is whole, lists it with the digest of each
    of its files. One that no longer matches its digests is passed over for the one before.

    Args:
        out: URL of the training's directory. When it is not on a local disk, checkpoints go through a temporary
            folder of each process.
        key: of the training's content; checkpoints of another key are ignored.
        keep: how many are kept.
    """

    def __init__(self, out: str, key: str, keep: int) -> None:
        self.url, self.key, self.keep = storage.join(out, RESUME), key, keep

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """All processes call it, with the same `state` (JSON values)."""
        tag = f"step-{step:08d}"
        kept = [entry for entry in self._entries() if entry["tag"] != tag]
        if dist.get_rank() == 0:
            storage.remove(storage.join(self.url, tag))
        dist.barrier()
        with self._folder() as folder:
            engine.save(str(folder), tag, state)
            files = self._publish(folder / tag, tag)
        if dist.get_rank() == 0:
            kept.append({"tag": tag, "step": step, "files": files, **self._layout(engine)})
            kept = kept[-self.keep :]
            storage.write_json(storage.join(self.url, _LATEST), {"key": self.key, "checkpoints": kept})
            for name in storage.list_names(self.url):
                if name != _LATEST and name not in {entry["tag"] for entry in kept}:
                    storage.remove(storage.join(self.url, name))
        dist.barrier()

    def load(self, engine: Engine) -> tuple[dict[str, Any] | None, list[str]]:
        """Bring an engine back to the latest whole checkpoint.

        Returns:
            (the state saved with it, or None when there is none; what was passed over and why).
        """
        box: list[Any] = [None, []]
        if dist.get_rank() == 0:
            for entry in reversed(self._entries()):
                fault = self._fault(entry, engine)
                if fault is None:
                    box[0] = entry
                    break
                box[1].append(f"{entry['tag']} {fault}")
        dist.broadcast_object_list(box, src=0)
        entry, notes = box
        if entry is None:
            return None, notes
        with self._folder() as folder:
            if not storage.is_local(self.url):
                (folder / entry["tag"]).mkdir()
                for name in entry["files"]:
                    data = storage.read_bytes(storage.join(self.url, entry["tag"], name))
                    (folder / entry["tag"] / name).write_bytes(data)
            try:
                return engine.load(str(folder), entry["tag"]), notes
            except Exception as error:
                raise WinnowError(
                    f"DeepSpeed cannot resume from it ({type(error).__name__}: {error})",
                    where=storage.join(self.url, entry["tag"]),
                    do="Remove the folder to train from the start.",
                ) from error

    def _entries(self) -> list[dict[str, Any]]:
        """The listed checkpoints, oldest first; none if they are of another training."""
        url = storage.join(self.url, _LATEST)
        if not storage.exists(url):
            return []
        try:
            content = storage.read_json(url)
            return list(content["checkpoints"]) if content["key"] == self.key else []
        except (WinnowError, KeyError, TypeError):
            return []

    def _fault(self, entry: dict[str, Any], engine: Engine) -> str | None:
        mine = self._layout(engine)
        if mine["zero_stage"] != entry["zero_stage"] or (mine["zero_stage"] and mine["world"] != entry["world"]):
            return f"was saved by {entry['world']} processes under ZeRO stage {entry['zero_stage']}"
        for name, digest in entry["files"].items():
            url = storage.join(self.url, entry["tag"], name)
            if not storage.exists(url) or storage.digest_file(url) != digest:
                return f"is damaged ({name})"
        return None

    @staticmethod
    def _layout(engine: Engine) -> dict[str, int]:
        return {"world": dist.get_world_size(), "zero_stage": engine.config.zero_stage}

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        if storage.is_local(self.url):
            folder = storage.local_path(self.url)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        else:
            with tempfile.TemporaryDirectory() as name:
                yield Path(name)

    def _publish(self, folder: Path, tag: str) -> dict[str, str]:
        """Digests of a checkpoint's files by name, uploaded first where they are not in place."""
        local = storage.is_local(self.url)
        mine = {}
        if not local or dist.get_rank() == 0:
            for path in sorted(folder.iterdir() if folder.is_dir() else []):
                mine[path.name] = storage.digest_file(str(path))
                if not local:
                    storage.write_bytes(storage.join(self.url, tag, path.name), path.read_bytes())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return {name: digest for part in everyone for name, digest in part.items()}
