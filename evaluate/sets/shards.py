"""Sets cut into parts: a part is a run of the samples of one shard, small enough that no task sets the end of a run."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from winnow.evaluate.sets.layout import IMAGES, MEMBERS, TaskError, file_digest, split_tars
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.tar import Member, tar_samples

SPLITS = ("test", "train", "val")
PART_SAMPLES = 2048
MAX_MEMBER_BYTES = 16 << 20  # of what lies beside an image
_HEAD = 1 << 20
_AT_ONCE = 64  # samples read with one request


@dataclass(frozen=True)
class Part:
    """Part `index` of the `count` that a shard is cut into.

    Attributes:
        tar: URL of the shard.
        digest: of its content.
        samples: about how many it has.
    """

    tar: str
    digest: str
    index: int
    count: int
    samples: int

    @property
    def name(self) -> str:
        """By content, safe as a path."""
        return f"{self.digest[:24]}/{self.index}-of-{self.count}"

    def values(self) -> dict[str, Any]:
        """As JSON values; `Part(**values)` gives it back."""
        return asdict(self)


@dataclass(frozen=True)
class Raw:
    """A sample as it lies in the tar.

    Attributes:
        key: of the sample.
        image: the encoded image; None where it has none.
        members: what `data.MEMBERS` names, by extension; the image's own extension with nothing.
    """

    key: str
    image: bytes | None
    members: Mapping[str, bytes]


def has_split(url: str, split: str) -> bool:
    """Whether a set has a split ("train", "val"); broken or whole."""
    return storage.is_dir(storage.join(url, split))


def split_into_parts(url: str, split: str, part_samples: int = PART_SAMPLES) -> list[Part]:
    """The parts of a split of a set, in order.

    A shard on a local disk is cut into parts of about `part_samples`; how many it has is reckoned from its first MiB,
    so that planning stays quick. One on an object store is a part, for cutting it would have it fetched more than once.

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
    try:
        for _, members in tar_samples(io.BytesIO(head), ()):
            count += 1
            end = max(member.offset + member.size for member in members.values())
    except WinnowError:
        pass  # the head is cut; whether the shard is will be seen when it is read
    if len(head) < _HEAD:
        end = len(head)  # all of it: the count is right
    return max(512.0, end / count) if count else float(_HEAD)


def read_part(part: Part) -> Iterator[Raw]:
    """The samples of a part, in order. Raises TaskError when the tar is cut."""
    if not storage.is_local(part.tar):
        yield from _streamed(part.tar)
        return
    samples = shard_index(part.tar, storage.version_token(part.tar))
    n = len(samples)
    selected = samples[part.index * n // part.count : (part.index + 1) * n // part.count]
    for low in range(0, len(selected), _AT_ONCE):
        yield from _read(part.tar, selected[low : low + _AT_ONCE])


Index = tuple[tuple[str, tuple[Member, ...]], ...]


@functools.lru_cache(maxsize=8)
def shard_index(tar: str, token: str) -> Index:
    """Keys and members, without their data, of the samples of a shard; `token` tells one version from the next.

    Raises:
        TaskError: the tar is cut.
    """
    try:
        with storage.open_read(tar) as file:
            return tuple((key, tuple(members.values())) for key, members in tar_samples(file, ()))
    except TaskError:
        raise
    except WinnowError as error:
        raise TaskError(error.what, where=tar, do=error.do) from error


def _read(tar: str, samples: Index) -> Iterator[Raw]:
    wanted = [_wanted(members) for _, members in samples]
    members = [member for batch in wanted for member in batch]
    data = iter(storage.read_ranges(tar, [m.offset for m in members], [m.size for m in members]))
    for (key, _), batch in zip(samples, wanted, strict=True):
        yield _raw(key, [(member.ext, next(data)) for member in batch])


def _wanted(members: Sequence[Member]) -> list[Member]:
    by_ext = {member.ext: member for member in members}
    image = next((ext for ext in IMAGES if ext in by_ext), None)
    return [by_ext[ext] for ext in (image, *MEMBERS) if ext in by_ext and _fits(ext, by_ext[ext].size)]


def _fits(ext: str, size: int) -> bool:
    return ext in EXTENSIONS or size <= MAX_MEMBER_BYTES


def _streamed(tar: str) -> Iterator[Raw]:
    with storage.open_read(tar) as file:
        try:
            for key, members in tar_samples(file, (*EXTENSIONS, *MEMBERS)):
                yield _raw(key, [(member.ext, member.data) for member in _wanted(tuple(members.values()))])
        except TaskError:
            raise
        except WinnowError as error:
            raise TaskError(error.what, where=tar, do=error.do) from error


def _raw(key: str, found: Sequence[tuple[str, bytes]]) -> Raw:
    image = next((data for ext, data in found if ext in EXTENSIONS), None)
    return Raw(key, image, {ext: b"" if ext in EXTENSIONS else data for ext, data in found})


def read_images(parts: Sequence[Part], indices: Sequence[int]) -> list[bytes]:
    """Encoded images of a split by their place in it, counted over its parts and over all samples.

    For the few that a protocol looks at again.
    """
    shards: dict[str, str] = {}
    for part in parts:
        shards.setdefault(part.tar, "")
    found: dict[int, bytes] = {}
    first = 0
    for tar in shards:
        samples = shard_index(tar, storage.version_token(tar))
        here = [index for index in sorted(set(indices)) if first <= index < first + len(samples)]
        batch = tuple(samples[index - first] for index in here)
        for index, raw in zip(here, _read(tar, batch), strict=True):
            if raw.image is not None:
                found[index] = raw.image
        first += len(samples)
    return [found[index] for index in indices]
