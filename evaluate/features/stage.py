"""The embed stage: what every encoder makes of every set, kept by content, so that nothing is embedded again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from winnow.evaluate.features.embed import decode_threads, embed
from winnow.evaluate.protocols.base import NEED_TRAIN, applies
from winnow.evaluate.sets.layout import MEMBERS, EvalSet, FoundTask, TaskError, find_tasks
from winnow.evaluate.sets.shards import (
    PART_SAMPLES,
    Part,
    Raw,
    has_split,
    read_part,
    split_into_parts,
)
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.progress import write_note
from winnow.infra.stages.resources import Resources
from winnow.infra.stages.runner import note_url
from winnow.infra.stages.stage import Output, Stage, Unit

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

PROMPTS_AT_ONCE = 8192  # of a unit
SAMPLES = pa.schema([("key", pa.string()), ("members", pa.map_(pa.string(), pa.binary())), ("skipped", pa.string())])

# The encoders of the last group in this process: the next part mostly wants the same.
_ENCODERS: dict[tuple[str, str, str, str], Any] = {}


def encoders_of(
    wanted: Sequence[tuple[str, str]], device: str, threads: int | None, precision: str
) -> list[Encoder | str]:
    """The encoder of each (spec, digest), or the sentence saying why it cannot be loaded.

    Keeps those asked for last in memory, so a process needs memory for all that are evaluated together.

    Raises:
        UsageError: a spec names nothing.
    """
    keys = [(spec, digest, device, precision) for spec, digest in wanted]
    for key in set(_ENCODERS) - set(keys):
        del _ENCODERS[key]
    found: list[Encoder | str] = []
    for key in keys:
        if key not in _ENCODERS:
            from winnow.pretrain.encoder import load_encoder

            try:
                _ENCODERS[key] = load_encoder(key[0], device=device, threads=threads, precision=precision)
            except UsageError:
                raise
            except WinnowError as error:
                found.append(f"the checkpoint {error.what}")
                continue
        found.append(_ENCODERS[key])
    return found


def _not_finite(**features: np.ndarray) -> str | None:
    """What the figures of such an encoder would be worth nothing for."""
    for of, array in features.items():
        wrong = int((~np.isfinite(array).all(axis=1)).sum())
        if wrong:
            return f"the encoder's features are not finite, for {wrong:,} of {len(array):,} {of}"
    return None


def captions_in(members: Mapping[str, bytes]) -> list[str]:
    """The captions of a sample, one a line; those that are not UTF-8 are left to be told of when they are read."""
    return [line for line in members.get("txt", b"").decode("utf-8", "replace").splitlines() if line.strip()]


@dataclass
class SetsStage(Stage):
    """What the stages that take checkpoints to sets are told.

    Args:
        checkpoints: (name, encoder spec, digest) of each.
        data: folder of test sets in DataComp's layout.
        out: directory of what the stage makes.
        tasks: "all" for every set in the folder, or keys or names.
        protocols: which of `winnow.evaluate.protocols.base.PROTOCOLS`; some need no training set, some no prompts.
        device: for encoders and probes; "auto" takes a GPU where there is one.
        batch_size: images an encoder sees at once.
        precision: of the encoders' matrix products, "float32" or "bfloat16" (`winnow.pretrain.encoder.load_encoder`).
        threads: CPU threads of an encoder; None leaves it to torch.
        part_samples: samples of a set that are embedded in one piece, about.
        unit_resources: what a unit asks of the cluster.
    """

    checkpoints: tuple[tuple[str, str, str], ...]
    data: str
    out: str
    tasks: tuple[str, ...] | str = "all"
    protocols: tuple[str, ...] = ("zeroshot",)
    device: str = "auto"
    batch_size: int = 256
    precision: str = "float32"
    threads: int | None = None
    part_samples: int = PART_SAMPLES
    unit_resources: Resources = field(default_factory=lambda: Resources(gpus=1, gpu_optional=True))

    keep_stale = True
    allow_failures = True

    @property
    def resources(self) -> Resources:
        return self.unit_resources

    def params(self) -> dict[str, Any]:
        return {}

    def parents(self) -> dict[str, str]:
        return {f"checkpoint/{name}": digest for name, _, digest in self.checkpoints}

    def found(self) -> list[FoundTask]:
        """The sets. Raises UsageError as `find_tasks`."""
        return find_tasks(storage.absolute(self.data), self.tasks)


@dataclass
class EmbedStage(SetsStage):
    """Embed sets with checkpoints.

    The images of a set are split into parts (`winnow.evaluate.sets.shards`). A unit is one encoder on one part; the
    units of one
    part run together, so that its images are decoded once, with one more that keeps what lies beside the images.
    Prompts are embedded in units of some thousand. Files are named and keyed by content: a new checkpoint embeds
    alone, a changed class name embeds no image, and one folder serves any number of evaluations.

    A part that is broken leaves a record that says so. An encoder that cannot be loaded leaves none, and is tried
    again by the next run. Nothing is skipped here; the evaluate stage counts what it could not use.

    Files:
        ENCODER/SHARD/I-of-N.npy: float32 [n, dim], L2-normalised, the images of a part that can be decoded. ENCODER
            is its digest's beginning, with the precision behind it where that is not float32.
        ENCODER/SHARD/I-of-N-captions.npy, …-texts.npy: the same for a retrieval set, and float32 [m, dim], the captions
            of the part's samples, one after the other.
        ENCODER/prompts/DIGEST.npy: float32 [classes, dim], the class weights of some classes.
        samples/SHARD/I-of-N.parquet: key, members, and why an image cannot be decoded, of each sample.
    """

    name = "embed"
    version = 2

    def encoders(self) -> dict[str, str]:
        """Spec by digest, each encoder once, whatever number of names it has."""
        return {digest: spec for _, spec, digest in reversed(self.checkpoints)}

    def plan(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        for found in self.found():
            if not any(applies(protocol, found.task.kind) for protocol in self.protocols):
                continue
            for split in self.splits(found):
                try:
                    parts = self.parts(found, split)
                except (TaskError, OSError):
                    continue  # the evaluate stage says what is wrong with it
                for part in parts:
                    group = f"{storage.name_of(found.url)}/{split} {storage.name_of(part.tar)} {part.index}"
                    mine = [self.samples_unit(part)]
                    mine += [self.images_unit(part, digest, found) for digest in self.encoders()]
                    for unit in mine:
                        units.setdefault(unit.name, replace(unit, group=group))
            for unit in self.prompt_units(found):
                units.setdefault(unit.name, unit)
        return list(units.values())

    def splits(self, found: FoundTask) -> list[str]:
        """The splits of a set that some protocol asked for looks at."""
        wanted = ["test"]
        if any(applies(protocol, found.task.kind) for protocol in NEED_TRAIN.intersection(self.protocols)):
            wanted += [split for split in ("train", "val") if has_split(found.url, split)]
        return wanted

    def parts(self, found: FoundTask, split: str) -> list[Part]:
        """The parts of a split. Raises TaskError."""
        return split_into_parts(found.url, split, self.part_samples)

    def samples_unit(self, part: Part) -> Unit:
        return Unit(
            f"samples/{part.name}",
            inputs={"shard": part.digest},
            params={"part": [part.index, part.count], "members": list(MEMBERS)},
            runtime={"part": part.values()},
        )

    def images_unit(self, part: Part, encoder: str, found: FoundTask) -> Unit:
        captions = found.task.kind == "retrieval"
        return Unit(
            f"{self._folder(encoder)}/{part.name}{'-captions' if captions else ''}",
            inputs={"encoder": encoder, "shard": part.digest},
            params={"part": [part.index, part.count], "captions": captions, "precision": self.precision},
            runtime={"part": part.values(), "spec": self.encoders()[encoder]},
            items=part.samples,
        )

    def _folder(self, encoder: str) -> str:
        return encoder[:24] + ("" if self.precision == "float32" else f"-{self.precision}")

    def prompt_units(self, found: FoundTask) -> list[Unit]:
        """Units for the class weights of a set, some classes each; in the order of the classes within an encoder."""
        if "zeroshot" not in self.protocols:
            return []
        try:
            test_set = EvalSet.open(found)
        except TaskError:
            return []
        prompts = [test_set.prompts(name) for name in test_set.classnames]
        if len({len(texts) for texts in prompts}) != 1:
            return []  # no class weights: no classes, or not one set of prompts for all
        step = max(1, PROMPTS_AT_ONCE // len(test_set.templates))
        units = []
        for low in range(0, len(prompts), step):
            batch = prompts[low : low + step]
            content = storage.digest_json(batch)
            for digest, spec in self.encoders().items():
                units.append(
                    Unit(
                        f"{self._folder(digest)}/prompts/{content[:24]}",
                        inputs={"encoder": digest, "prompts": content},
                        params={"precision": self.precision},
                        runtime={"prompts": batch, "spec": spec},
                        group=f"{storage.name_of(found.url)} prompts {low}",
                    )
                )
        return units

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        mine = [unit for unit in units if "encoder" in unit.inputs]
        encoders = encoders_of(
            [(unit.runtime["spec"], unit.inputs["encoder"]) for unit in mine], self.device, self.threads, self.precision
        )
        ready = [(u, encoder) for u, encoder in zip(mine, encoders, strict=True) if not isinstance(encoder, str)]
        if "prompts" in units[0].inputs:
            for unit, encoder in ready:
                yield unit, self._prompts(unit, encoder)
            return
        yield from self._images(ready, [unit for unit in units if "encoder" not in unit.inputs], units[0])

    def _prompts(self, unit: Unit, encoder: Encoder) -> Output:
        from winnow.evaluate.protocols.zeroshot import prompt_weights

        if not encoder.has_text:
            return Output(values={"text": False})
        weights = prompt_weights(encoder.encode_texts, unit.runtime["prompts"])
        if fault := _not_finite(prompts=weights):
            return Output(values={"error": fault})
        return Output([self._save(unit, weights)], values={"text": True})

    def _images(
        self, ready: Sequence[tuple[Unit, Encoder]], samples: Sequence[Unit], first: Unit
    ) -> Iterator[tuple[Unit, Output]]:
        part = Part(**first.runtime["part"])
        raws: list[Raw] = []

        def encoded() -> Iterator[bytes]:
            for raw in read_part(part):
                raws.append(Raw(raw.key, None, raw.members))
                yield raw.image or b""

        try:
            threads = decode_threads(self.device)
            made = embed(encoded(), [encoder for _, encoder in ready], self.batch_size, threads, self._notes(first))
        except TaskError as error:
            # By content: the shard may lie elsewhere, too, when this is read.
            for unit in [*samples, *(unit for unit, _ in ready)]:
                yield unit, Output(values={"broken": [error.what, error.do]})
            return
        for unit in samples:
            yield unit, self._samples(unit, raws, made.skipped)
        for (unit, encoder), images in zip(ready, made.images, strict=True):
            texts = np.empty((0, encoder.dim), np.float32)
            if with_texts := unit.params["captions"] and encoder.has_text:
                texts = encoder.encode_texts([text for raw in raws for text in captions_in(raw.members)])
            if fault := _not_finite(encoded=images, captions=texts):
                yield unit, Output(values={"error": fault})
                continue
            files = [self._save(unit, images)]
            if with_texts:
                files.append(self._save(unit, texts, "-texts"))
            yield unit, Output(files, len(images), values={"text": encoder.has_text})

    def _samples(self, unit: Unit, raws: Sequence[Raw], skipped: dict[int, str]) -> Output:
        rows = [
            {"key": raw.key, "members": list(raw.members.items()), "skipped": skipped.get(i)}
            for i, raw in enumerate(raws)
        ]
        file = f"{unit.name}.parquet"
        with storage.writing(self.url(file)) as path:
            pq.write_table(pa.Table.from_pylist(rows, SAMPLES), path)
        return Output([file])

    def _save(self, unit: Unit, array: np.ndarray, suffix: str = "") -> str:
        file = f"{unit.name}{suffix}.npy"
        with storage.writing(self.url(file)) as path, path.open("wb") as out:
            np.save(out, np.ascontiguousarray(array, np.float32), allow_pickle=False)
        return file

    def _notes(self, unit: Unit) -> Callable[[int], None]:
        started = last = time.monotonic()

        def note(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 2:
                last = now
                write_note(note_url(self, unit), f"{unit.group}: {done:,} images {done / (now - started):,.0f}/s")

        return note
