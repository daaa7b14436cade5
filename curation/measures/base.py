"""The Measure contract."""

from __future__ import annotations

import abc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from infra.storage import digest_json

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Samples:
    """A batch of samples as a measure sees it.

    Attributes:
        table: the wanted pool columns, shape [n].
        images: decoded RGB pictures, None where undecodable; empty when no measure wants pixels. Length n.
    """

    table: pa.Table
    images: list[Image | None]

    def __len__(self) -> int:
        return self.table.num_rows


@dataclass(frozen=True)
class Measure(abc.ABC):
    """A column family. Subclasses are frozen dataclasses whose fields are the parameters.

    Class attributes:
        name: what columns are called by: `clip.score` is column `score` of measure `clip`.
        version: raise it when the values change.
        pixels: whether it wants decoded pictures.
        reads: pool columns it wants.
        summary: one line for `winnow ls measures`.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    pixels: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""

    def params(self) -> dict[str, Any]:
        """What decides the values; no paths, but the digests of what lies there."""
        return asdict(self)

    @property
    def id(self) -> str:
        """Directory of its columns: the name and eight digits of what decides the values."""
        return f"{self.name}-{digest_json([self.name, self.version, self.params()])[:8]}"

    @property
    def gpus(self) -> float:
        """GPUs it asks for; negative: if there are any."""
        return 0

    @abc.abstractmethod
    def schema(self) -> pa.Schema:
        """Names (without the measure's) and types of its columns."""

    @abc.abstractmethod
    def compute(self, samples: Samples) -> pa.Table:
        """The columns of a batch, in its order. A sample that cannot be measured gets nulls. Shape [n]."""
