"""The embed stage: the features of every set by every encoder, stored by content, so that none is computed twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from winnow.evaluate.features.embed import decode_threads, embed
from winnow.evaluate.protocols.base import Kind, Protocol, Target, Targets, load_kind, load_protocol
from winnow.evaluate.protocols.zeroshot import prompt_weights
from winnow.evaluate.sets.files import data_digest, open_set
from winnow.evaluate.sets.layout import FoundTask, find_tasks
from winnow.evaluate.sets.shards import (
    PART_SAMPLES,
    Part,
    Wanted,
    as_columns,
    has_split,
    read_part,
    read_target,
    split_into_parts,
)
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.params import build
from winnow.infra.stages.progress import write_note
from winnow.infra.stages.resources import Resources
from winnow.infra.stages.runner import note_url
from winnow.infra.stages.stage import Output, Record, Stage, Unit
from winnow.pretrain.encoder import not_finite

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

PROMPTS_AT_ONCE = 8192  # of a unit
TARGETS = pa.schema(
    {
        "key": pa.string(),
        "label": pa.int64(),
        "captions": pa.list_(pa.string()),
        "metadata": pa.list_(pa.float64()),
        "fault": pa.string(),
        "skipped": pa.string(),
    }
)


@dataclass
class SetsStage(Stage):
    """The arguments of the stages that run checkpoints on sets."""

    checkpoints: tuple[tuple[str, str, str], ...]  # (name, encoder spec, digest) of each
    data: str  # folder of test sets in DataComp's layout
    out: str
    tasks: tuple[str, ...] | str = "all"  # "all" for every set in the folder, or keys, names or task files
    protocols: tuple[str, ...] = ("zeroshot",)  # names in `winnow.evaluate.protocols.PROTOCOLS`, or "module:OBJECT"
    device: str = "auto"  # for encoders and probes; "auto" takes a GPU where there is one
    batch_size: int = 256  # images an encoder sees at once
    precision: str = "float32"  # of the encoders' matrix products, "float32" or "bfloat16"
    threads: int | None = None  # CPU threads of an encoder; None leaves it to torch
    part_samples: int = PART_SAMPLES  # samples of a set that are embedded by one unit, approximately

    keep_stale = True
    allow_failures = True

    @property
    def resources(self) -> Resources:
        return Resources(gpus=1, gpu_optional=True)

    def params(self) -> dict[str, Any]:
        return {}

    def parents(self) -> dict[str, str]:
        return {f"checkpoint/{name}": digest for name, _, digest in self.checkpoints}

    def found(self) -> list[FoundTask]:
        return find_tasks(storage.absolute(self.data), self.tasks)

    def splits(self, found: FoundTask) -> list[str]:
        """The splits of a set that the protocols need."""
        needed = self.applying(found)
        wanted = ["test"] if needed else []
        if any("train" in protocol.needs for protocol in needed):
            wanted += [split for split in ("train", "val") if has_split(found.url, split)]
        return wanted

    def data_digests(self, found: FoundTask) -> dict[str, str]:
        """The digest of each of these splits."""
        return {split: data_digest(found.url, split) for split in self.splits(found)}

    def applying(self, found: FoundTask) -> list[Protocol]:
        """The protocols that score a set. Raises UsageError for a name that is unknown."""
        return [one for one in map(load_protocol, self.protocols) if one.applies(found.kind)]

    def needs_prompts(self, found: FoundTask) -> bool:
        return any("text" in one.needs for one in self.applying(found))

    def listing(self, found: FoundTask) -> str:
        """Path of the list of a set's features by these checkpoints, below the directory of features. Other arguments
        give another path, so that stages which share the directory do not disturb each other."""
        encoders = sorted({digest for _, _, digest in self.checkpoints})
        content = [found.task.model_dump(mode="json"), self.data_digests(found), self.needs_prompts(found), encoders]
        return f"listings/{storage.digest_json([*content, self.precision, self.part_samples])[:24]}.json"


Parts = list[tuple[Part, Unit, dict[str, Unit]]]  # each with the unit of its samples, and of its images by encoder


@dataclass
class EmbedStage(SetsStage):
    """Embed sets with checkpoints.

    The images of a set are split into parts (`winnow.evaluate.sets.shards`). A unit is one encoder on one part. The
    units of a part run together, so that its images are decoded once; one more unit stores what is known of the
    samples. Prompts are embedded in units of some thousand. Files are named and keyed by content: a new checkpoint
    is embedded alone, a changed class name embeds no image, and one folder serves any number of evaluations.

    A part that is broken leaves a record that says so. An encoder that cannot be loaded leaves none, and the next run
    tries it again. Nothing is skipped here; the evaluate stage counts what it could not use.

    Files:
        ENCODER/SHARD/I-of-N.npy: float32 [n, dim], L2-normalised, the images of a part that can be decoded. ENCODER
            is the beginning of its digest, followed by the precision where that is not float32.
        ENCODER/SHARD/I-of-N-captions.npy, …-texts.npy: the same for a set with captions, and float32 [m, dim], the
            captions of the part's samples, in order.
        ENCODER/prompts/DIGEST.npy: float32 [classes, dim], the class weights of some classes.
        samples/SHARD/I-of-N-KIND.parquet: for each sample its key, label, captions and metadata, what is wrong with
            them, and why its image cannot be decoded. KIND is a digest of what reads them.
        listings/DIGEST.json: the features of a set (`SetsStage.listing`). "splits" has by split the digest of its data,
            and for each part the names of its units; "prompts" by encoder the names of the units of its class weights;
            "units" by name the files and values of each finished unit.
    """

    name = "embed"
    version = 3

    def parents(self) -> dict[str, str]:
        """Those of the checkpoints and of the sets, so that the listing follows both."""
        digests = super().parents()
        for found in self.found():
            digests |= {f"{found.task.key}/{split}": digest for split, digest in self.data_digests(found).items()}
        return digests

    def manifest_key(self, units: Iterable[Unit]) -> str:
        """The listings are part of it, so that a run which finds no work still writes its own."""
        return storage.digest_json([super().manifest_key(units), *map(self.listing, self.found())])

    def encoders(self) -> dict[str, str]:
        """Spec by digest, each encoder once, whatever number of names it has."""
        return {digest: spec for _, spec, digest in reversed(self.checkpoints)}

    def plan(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        for found in self.found():
            for split, parts in self.split_parts(found).items():
                for part, samples, images in parts:
                    group = f"{storage.name_of(found.url)}/{split} {storage.name_of(part.tar)} {part.index}"
                    for unit in (samples, *images.values()):
                        units.setdefault(unit.name, replace(unit, group=group))
            for unit in self.prompt_units(found):
                units.setdefault(unit.name, unit)
        return list(units.values())

    def split_parts(self, found: FoundTask) -> dict[str, Parts]:
        """Of each split that is needed and not broken; the evaluate stage says what is wrong with the others."""
        found_parts: dict[str, Parts] = {}
        for split in self.splits(found):
            with contextlib.suppress(TaskError, OSError):
                found_parts[split] = [
                    (
                        part,
                        self.samples_unit(part, found),
                        {e: self.images_unit(part, e, found) for e in self.encoders()},
                    )
                    for part in split_into_parts(found.url, split, self.part_samples)
                ]
        return found_parts

    def samples_unit(self, part: Part, found: FoundTask) -> Unit:
        kind = load_kind(found.task.kind)
        members = list(kind.members(found.task))
        params = {"kind": [found.task.kind, kind.version], "images": list(kind.images), "members": members}
        return Unit(
            f"samples/{part.name}-{storage.digest_json(params)[:8]}",
            inputs={"shard": part.digest},
            params={"part": [part.index, part.count], **params},
            runtime={"part": asdict(part), "task": found.task.model_dump(mode="json")},
        )

    def images_unit(self, part: Part, encoder: str, found: FoundTask) -> Unit:
        kind = load_kind(found.task.kind)
        params: dict[str, Any] = {"captions": kind.embeds_captions}
        suffix = "-captions" if kind.embeds_captions else ""
        # Only what differs from the default is part of the key.
        if kind.embeds_captions and kind.version > 1:
            params["version"], suffix = kind.version, f"-captions{kind.version}"
        if kind.flatten:
            params["flatten"], suffix = True, f"{suffix}-flat"
        if kind.images != Kind.images:
            params["images"] = list(kind.images)
            suffix += f"-{storage.digest_json(params)[:8]}"
        runtime = {"part": asdict(part), "spec": self.encoders()[encoder], "task": found.task.model_dump(mode="json")}
        return Unit(
            f"{self._folder(encoder)}/{part.name}{suffix}",
            inputs={"encoder": encoder, "shard": part.digest},
            params={"part": [part.index, part.count], "precision": self.precision, **params},
            runtime=runtime,
            items=part.samples,
        )

    def _folder(self, encoder: str) -> str:
        return encoder[:24] + ("" if self.precision == "float32" else f"-{self.precision}")

    def prompt_units(self, found: FoundTask) -> list[Unit]:
        """Units for the class weights of a set, some classes each; in the order of the classes within an encoder."""
        if not self.needs_prompts(found):
            return []
        try:
            test_set = open_set(found.task, found.url)
        except TaskError:
            return []
        prompts = [test_set.prompts(name) for name in test_set.classnames]
        if len({len(texts) for texts in prompts}) != 1:
            return []  # no class weights: no classes, or different numbers of prompts
        step = max(1, PROMPTS_AT_ONCE // len(test_set.templates))
        batches = {low: prompts[low : low + step] for low in range(0, len(prompts), step)}
        contents = {low: storage.digest_json(batch) for low, batch in batches.items()}
        return [
            Unit(
                f"{self._folder(digest)}/prompts/{contents[low][:24]}",
                inputs={"encoder": digest, "prompts": contents[low]},
                params={"precision": self.precision},
                runtime={"prompts": batch, "spec": spec},
                group=f"{storage.name_of(found.url)} prompts {low}",
            )
            for low, batch in batches.items()
            for digest, spec in self.encoders().items()
        ]

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        from winnow.pretrain.encoder import load_encoders

        encoded = [unit for unit in units if "encoder" in unit.inputs]
        wanted = [(unit.runtime["spec"], unit.inputs["encoder"]) for unit in encoded]
        encoders = load_encoders(wanted, self.device, self.threads, self.precision)
        ready = [
            (u, encoder) for u, encoder in zip(encoded, encoders, strict=True) if not isinstance(encoder, WinnowError)
        ]
        if "prompts" in units[0].inputs:
            for unit, encoder in ready:
                yield unit, self._prompts(unit, encoder)
            return
        yield from self._images(ready, [unit for unit in units if "encoder" not in unit.inputs], units[0])

    def _prompts(self, unit: Unit, encoder: Encoder) -> Output:
        if not encoder.has_text:
            return Output(values={"text": False})
        weights = prompt_weights(encoder.encode_texts, unit.runtime["prompts"])
        if fault := not_finite(prompts=weights):
            return Output(values={"error": fault})
        return Output([self._save(unit, weights)], values={"text": True})

    def _images(
        self, ready: Sequence[tuple[Unit, Encoder]], samples: Sequence[Unit], first: Unit
    ) -> Iterator[tuple[Unit, Output]]:
        task = build(Task, first.runtime["task"], "task")
        part, kind = Part(**first.runtime["part"]), load_kind(task.kind)
        read: list[tuple[str, Target, str | None]] = []

        def encoded() -> Iterator[bytes]:
            for sample in read_part(part, Wanted.by(kind, task)):
                read.append(read_target(kind, sample))
                yield kind.encoded_image(sample) or b""

        try:
            threads = decode_threads(self.device)
            encoders = [encoder for _, encoder in ready]
            made = embed(encoded(), encoders, self.batch_size, threads, self._notes(first), kind.flatten)
        except TaskError as error:
            # Without the location: an equal shard may be part of another set.
            for unit in [*samples, *(unit for unit, _ in ready)]:
                yield unit, Output(values={"broken": [error.what, error.do]})
            return
        targets, faults = as_columns(read)
        for unit in samples:
            yield unit, self._samples(unit, targets, faults, made.skipped)
        for (unit, encoder), images in zip(ready, made.images, strict=True):
            texts = np.empty((0, encoder.dim), np.float32)
            if with_texts := unit.params["captions"] and encoder.has_text:
                texts = encoder.encode_texts([text for captions in targets.captions for text in captions])
            if fault := not_finite(images=images, captions=texts):
                yield unit, Output(values={"error": fault})
                continue
            files = [self._save(unit, images)]
            if with_texts:
                files.append(self._save(unit, texts, "-texts"))
            yield unit, Output(files, len(images), values={"text": encoder.has_text})

    def _samples(self, unit: Unit, targets: Targets, faults: Sequence[str | None], skipped: dict[int, str]) -> Output:
        reasons = [skipped.get(i) for i in range(len(faults))]
        columns = [targets.keys, targets.labels, targets.captions, targets.metadata, faults, reasons]
        file = f"{unit.name}.parquet"
        with storage.writing(self.url(file)) as path:
            pq.write_table(pa.table(dict(zip(TARGETS.names, columns, strict=True)), schema=TARGETS), path)
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

    def finish(self, records: list[Record]) -> Output:
        units = {record.unit: {"files": sorted(record.files), **record.values} for record in records}
        files = []
        for found in self.found():
            splits: dict[str, Any] = {}
            prompts: dict[str, list[str]] = {}
            names = set()
            for split, parts in self.split_parts(found).items():
                splits[split] = {"data": data_digest(found.url, split), "parts": []}
                for part, samples, images in parts:
                    of = {digest: unit.name for digest, unit in images.items()}
                    entry = {"shard": storage.name_of(part.tar), "samples": samples.name, "images": of}
                    splits[split]["parts"].append(entry)
                    names |= {samples.name, *of.values()}
            for unit in self.prompt_units(found):
                prompts.setdefault(unit.inputs["encoder"], []).append(unit.name)
                names.add(unit.name)
            listed = {name: units[name] for name in names & units.keys()}
            files.append(self.listing(found))
            storage.write_json(self.url(files[-1]), {"splits": splits, "prompts": prompts, "units": listed})
        return Output(files)
