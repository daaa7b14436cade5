"""The Measure contract."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from winnow.infra.errors import UsageError
from winnow.infra.io.storage import digest_json
from winnow.infra.stages.resources import Resources

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Samples:
    """A batch of samples as a measure sees it.

    Attributes:
        table: the wanted columns, of the pool and of other measures (`clip.image`), shape [n].
        images: decoded RGB images, None where undecodable; empty when no measure wants pixels. Length n.
        encoded: the images' files as bytes; empty when no measure wants them. Length n.
    """

    table: pa.Table
    images: list[Image | None]
    encoded: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return self.table.num_rows


@dataclass(frozen=True)
class Measure(abc.ABC):
    """A column family. Subclasses are frozen dataclasses whose fields are the parameters.

    Class attributes:
        name: what columns are called by: `clip.score` is column `score` of measure `clip`.
        version: raise it when the values change.
        pixels: whether it wants decoded images.
        encoded: whether it wants the images' files as they are.
        reads: pool columns it wants.
        derived: columns of other measures it wants (`clip.image`); those measures run before it. A measure that has
            any gets no images.
        summary: one line for `winnow ls measures`.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    pixels: ClassVar[bool] = False
    encoded: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""

    def params(self) -> dict[str, Any]:
        """What decides the values; no paths, but the digests of what lies there."""
        return asdict(self)

    @property
    def id(self) -> str:
        """The name and eight digits of what decides the values: the directory of its columns, if none is `derived`."""
        return f"{self.name}-{digest_json([self.name, self.version, self.params()])[:8]}"

    @classmethod
    def upstream(cls) -> tuple[str, ...]:
        """Names of the measures whose columns it wants, each once."""
        return tuple(dict.fromkeys(column.partition(".")[0] for column in cls.derived))

    @property
    def resources(self) -> Resources:
        """What it takes beside decoding."""
        return Resources(0)

    @abc.abstractmethod
    def schema(self) -> pa.Schema:
        """Names (without the measure's) and types of its columns."""

    @abc.abstractmethod
    def compute(self, samples: Samples) -> pa.Table:
        """The columns of a batch, in its order. A sample that cannot be measured gets nulls. Shape [n]."""


def with_upstream(names: Iterable[str], load: Callable[[str], type[Measure]]) -> dict[str, type[Measure]]:
    """Measures by name, and those whose columns they read, and so on.

    Args:
        names: as `load` takes them.
        load: from a name to the class.
    """
    kinds: dict[str, type[Measure]] = {}
    left = list(names)
    while left:
        name = left.pop(0)
        if name not in kinds:
            kinds[name] = load(name)
            left += kinds[name].upstream()
    return dict(sorted(kinds.items()))


def make(kind: type[Measure], params: Mapping[str, Any], scorer: Callable[[], tuple[str, str]]) -> Measure:
    """A measure by its parameters; one with an encoder gets the scorer's.

    Args:
        kind: the class.
        params: those of its fields that are given.
        scorer: the spec of the scorer and the digest of its content; asked only if it is wanted.

    Raises:
        UsageError: a parameter is lacking.
    """
    known = {item.name: item for item in fields(kind)}
    given = dict(params)
    if "encoder" in known:
        given["encoder"], given["digest"] = scorer()
    for name, item in known.items():
        if name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise UsageError(
                f'the measure "{kind.name}" needs "{name}"',
                do=f"Give it in a recipe: `measures: {{{kind.name}: {{{name}: ...}}}}`.",
            )
    return kind(**given)
