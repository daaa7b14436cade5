"""Sets split into parts: consecutive samples of one shard, few enough that no part takes much longer than another."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Kind, Target, Targets
from winnow.evaluate.sets.files import file_digest, split_tars
from winnow.evaluate.sets.packed import MAX_IMAGE_BYTES
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.tar import Member, tar_samples
from winnow.infra.pool.sample import Sample

PART_SAMPLES = 2048
MEMBERS = "members"  # column of a sample: the extensions of all that its tar has
MAX_MEMBER_BYTES = 64 << 20  # of a member other than an image; a larger one counts as missing
_HEAD = 1 << 20
_AT_ONCE = 64  # samples read with one request


@dataclass(frozen=True)
class Part:
    """Part `index` of the `count` that a shard is split into."""

    tar: str  # URL of the shard
    digest: str  # of its content
    index: int
    count: int
    samples: int  # estimated number

    @property
    def name(self) -> str:
        """By content, safe as a path."""
        return f"{self.digest[:24]}/{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Wanted:
    """Which members of a sample are read: the first that it has of `images`, and `members`, by extension."""

    images: tuple[str, ...]
    members: tuple[str, ...] = ()

    @staticmethod
    def by(kind: Kind, task: Task) -> Wanted:
        """Those that a kind of task reads."""
        return Wanted(kind.images, kind.members(task))

    def of(self, members: Sequence[Member]) -> list[Member]:
        by_ext = {member.ext: member for member in members}
        image = next((ext for ext in self.images if ext in by_ext), None)
        wanted = dict.fromkeys(ext for ext in (image, *self.members) if ext in by_ext)
        found = [by_ext[ext] for ext in wanted if ext in EXTENSIONS or by_ext[ext].size <= MAX_MEMBER_BYTES]
        # A larger image is cut, which makes it undecodable.
        return [replace(one, size=MAX_IMAGE_BYTES) if one.size > MAX_IMAGE_BYTES else one for one in found]


def has_split(url: str, split: str) -> bool:
    """Whether a set has a split ("train", "val"), broken or not."""
    return storage.is_dir(storage.join(url, split))


def split_into_parts(url: str, split: str, part_samples: int = PART_SAMPLES) -> list[Part]:
    """The parts of a split of a set, in order.

    A shard on a local disk is split into parts of about `part_samples`. Its number of samples is estimated from its
    first MiB, so that planning stays quick. A shard on an object store is one part, as more would fetch it repeatedly.

    Raises:
        TaskError: a shard, or their number, is missing.
    """
    parts = []
    for tar in split_tars(url, split):
        digest = file_digest(tar)
        if storage.is_local(tar):
            samples = max(1, round(storage.size_of(tar) / _bytes_per_sample(tar, storage.version_token(tar))))
            count = math.ceil(samples / part_samples)
        else:
            digest, samples, count = storage.digest_json([tar, digest]), part_samples, 1
        parts += [Part(tar, digest, index, count, math.ceil(samples / count)) for index in range(count)]
    return parts


@functools.lru_cache(maxsize=4096)
def _bytes_per_sample(tar: str, token: str) -> float:
    with storage.open_read(tar) as file:
        head = file.read(_HEAD)
    count, end = 0, len(head)
    # The head ends within a sample; whether the shard is truncated is found when it is read.
    with contextlib.suppress(WinnowError):
        for _, members in tar_samples(io.BytesIO(head), ()):
            count += 1
            end = max(member.offset + member.size for member in members.values())
    if len(head) < _HEAD:
        end = len(head)  # all of it: the count is right
    return max(512.0, end / count) if count else float(_HEAD)


def read_part(part: Part, wanted: Wanted) -> Iterator[Sample]:
    """The samples of a part, in order, with the members that are wanted. Raises TaskError when the tar is truncated."""
    if not storage.is_local(part.tar):
        yield from _streamed(part.tar, wanted)
        return
    samples = shard_index(part.tar, storage.version_token(part.tar))
    n = len(samples)
    selected = samples[part.index * n // part.count : (part.index + 1) * n // part.count]
    for low in range(0, len(selected), _AT_ONCE):
        yield from _read(part.tar, selected[low : low + _AT_ONCE], wanted)


Index = tuple[tuple[str, tuple[Member, ...]], ...]


@functools.lru_cache(maxsize=8)
def shard_index(tar: str, token: str) -> Index:
    """Keys and members, without their data, of the samples of a shard; `token` tells one version from the next.

    Raises:
        TaskError: the tar is truncated.
    """
    try:
        with storage.open_read(tar) as file:
            return tuple((key, tuple(members.values())) for key, members in tar_samples(file, ()))
    except WinnowError as error:
        raise TaskError(error.what, where=tar, do=error.do) from error


def _read(tar: str, samples: Index, wanted: Wanted) -> Iterator[Sample]:
    selected = [wanted.of(members) for _, members in samples]
    names = [[member.ext for member in members] for _, members in samples]
    members = [member for batch in selected for member in batch]
    data = iter(storage.read_ranges(tar, [m.offset for m in members], [m.size for m in members]))
    for (key, _), batch, found in zip(samples, selected, names, strict=True):
        yield Sample(key=key, members={member.ext: next(data) for member in batch}, columns={MEMBERS: found})


def _streamed(tar: str, wanted: Wanted) -> Iterator[Sample]:
    with storage.open_read(tar) as file:
        try:
            for key, members in tar_samples(file, (*wanted.images, *wanted.members)):
                read = {member.ext: member.data for member in wanted.of([*members.values()])}
                yield Sample(key=key, members=read, columns={MEMBERS: [*members]})
        except WinnowError as error:
            raise TaskError(error.what, where=tar, do=error.do) from error


def read_samples(tars: Sequence[str], indices: Sequence[int], wanted: Wanted) -> list[Sample]:
    """Samples of a split by their index, counted over all samples of its shards."""
    found: dict[int, Sample] = {}
    first = 0
    for tar in tars:
        samples = shard_index(tar, storage.version_token(tar))
        here = [index for index in sorted(set(indices)) if first <= index < first + len(samples)]
        batch = tuple(samples[index - first] for index in here)
        found |= zip(here, _read(tar, batch, wanted), strict=True)
        first += len(samples)
    return [found[index] for index in indices]


def read_target(kind: Kind, sample: Sample) -> tuple[str, Target, str | None]:
    """The key of a sample, what its kind reads of it, and what is wrong with it, or None."""
    if kind.encoded_image(sample) is None:
        # webdataset's extension begins at the first dot, so that `0001.input.jpg` is no `jpg` for DataComp either.
        found = ", ".join(f".{ext}" for ext in sample.columns.get(MEMBERS, ())[:5])
        return sample.key, Target(), f"no image{f' (it has {found})' if found else ''}"
    try:
        return sample.key, kind.read(sample), None
    except TaskError as error:
        return sample.key, Target(), error.what


def as_columns(read: Sequence[tuple[str, Target, str | None]]) -> tuple[Targets, list[str | None]]:
    """What `read_target` gave of several samples, as columns."""
    targets = [target for _, target, _ in read]
    labels = np.array([-1 if target.label is None else target.label for target in targets], np.int64)
    captions, metadata = [target.captions for target in targets], [target.metadata for target in targets]
    return Targets([key for key, _, _ in read], labels, captions, metadata), [fault for _, _, fault in read]


def check_targets(targets: Targets, faults: Sequence[str | None], test_set: EvalSet, tar: str) -> Targets:
    """`Kind.check` of the samples of a shard. Raises TaskError naming the first sample that has a fault."""
    for key, fault in zip(targets.keys, faults, strict=True):
        if fault is not None:
            raise TaskError(fault, where=f"{tar}, sample {key}")
    return test_set.kind.check(targets, test_set, tar)
