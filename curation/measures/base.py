"""The Measure contract, and measures as a recipe names them."""

from __future__ import annotations

import abc
import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

import pyarrow as pa
from PIL.Image import Image
from pydantic import Field

from winnow.curation.located import load_class, located
from winnow.curation.measures import MEASURES
from winnow.infra.errors import UsageError
from winnow.infra.io.storage import digest_json
from winnow.infra.params import ParameterError, build, names_of
from winnow.infra.registry import unknown
from winnow.infra.stages.resources import Resources

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Instance = Annotated[str, Field(pattern=r"^[\w-]+$")]
_RESERVED = ("scorer", "b32", "l14")  # what filters call the recipe's scorer and DataComp's columns
M = TypeVar("M", bound="Measure")


@dataclass(frozen=True)
class Samples:
    """A batch of n samples as a measure sees it.

    Attributes:
        table: the columns that were asked for, of the pool and of other measures (`clip.image`), shape [n].
        images: decoded RGB images, None where undecodable; empty when no measure asks for pixels. Length n.
        encoded: the files of the images as bytes; empty when no measure asks for them. Length n.
        read: reads a member of every sample; see `members`.
    """

    table: pa.Table
    images: list[Image | None] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)
    read: Callable[[pa.Table, str], list[bytes]] | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def members(self, ext: str) -> list[bytes]:
        """The member with an extension ("wav", "json") of every sample, read now; b"" where there is none. Length n.

        Raises ValueError when the measure does not declare `members`.
        """
        if self.read is None:
            raise ValueError("set `members = True` in the measure's class to read members")
        return self.read(self.table, ext)


class Measure(abc.ABC):
    """A family of columns. Subclasses are decorated with `winnow.infra.params.params`; their fields are parameters.

    Class attributes:
        name: as registered. Columns are named after the instance, which is called as its class unless the recipe gives
            it a name: `clip.score` is column `score` of the instance `clip`.
        version: raise it when the values change.
        pixels: whether it reads decoded images.
        encoded: whether it reads the files of the images.
        members: whether it reads other members through `Samples.members`.
        reads: pool columns that it reads.
        filled: parameters that Winnow fills in and a recipe cannot give.
        summary: one line for `winnow ls measures`.
        example: parameters that make a valid measure, for `winnow ls measures` and tests.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    pixels: ClassVar[bool] = False
    encoded: ClassVar[bool] = False
    members: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    filled: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    example: ClassVar[Mapping[str, Any]] = {}

    def named(self: M, name: str) -> M:
        """The same measure as an instance called `name`."""
        other = copy.copy(self)
        object.__setattr__(other, "name", name)
        return other

    def params(self) -> dict[str, Any]:
        """What decides the values; JSON values. Files are represented by their digests, not their paths."""
        return asdict(self)  # type: ignore[call-overload]

    @property
    def id(self) -> str:
        """The instance's name and eight digits of what decides the values: the directory of its columns, unless it
        reads other measures."""
        return f"{self.name}-{digest_json([type(self).name, self.version, self.params()])[:8]}"

    def derived(self) -> tuple[str, ...]:
        """Columns of other measures that it reads (`clip.image`). Those measures run first. A measure with any gets no
        images."""
        return ()

    def upstream(self) -> tuple[str, ...]:
        """Names of the measures whose columns it reads, each once."""
        return tuple(dict.fromkeys(column.partition(".")[0] for column in self.derived()))

    @property
    def needs_encoder(self) -> bool:
        """Whether its parameters `encoder` and `digest` are used."""
        return "encoder" in names_of(type(self))

    @property
    def resources(self) -> Resources:
        """What it takes besides decoding."""
        return Resources(0)

    def setup(self) -> None:
        """Load what `compute` uses (a model), once in each worker process."""
        return

    @abc.abstractmethod
    def schema(self) -> pa.Schema:
        """Names (without the instance's) and types of its columns."""

    def fields(self) -> tuple[str, ...]:
        """The names of `schema`, before `setup`; empty where they are not known, as of a measure with an encoder."""
        return () if self.needs_encoder else tuple(self.schema().names)

    @abc.abstractmethod
    def compute(self, samples: Samples) -> pa.Table:
        """The columns of a batch, in its order, shape [n]. A sample that cannot be measured gets nulls."""


@dataclass(frozen=True)
class MeasureSpec:
    """A measure as a recipe names it: the name of the instance, its class, and the parameters that are given."""

    name: str
    kind: type[Measure]
    params: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def draft(self) -> Measure:
        """The measure, possibly without its encoder."""
        return build(self.kind, self.params, self.name).named(self.name)

    @property
    def needs_scorer(self) -> bool:
        """Whether the recipe's scorer is its encoder."""
        return self.draft.needs_encoder and not self.params.get("encoder")


def parse_measures(given: Mapping[str, Any]) -> dict[str, MeasureSpec]:
    """The measures of a recipe by the names of their instances.

    A key that is a registered measure or `module:Class` has the parameters as its value. Any other key names an
    instance, and its value is a mapping from the measure to the parameters: `clip-b32: {clip: {encoder: ...}}`.

    Raises:
        ParameterError: an unknown measure or parameter, or a value that is refused; with the path to it.
    """
    specs: dict[str, MeasureSpec] = {}
    for key, body in given.items():
        with located(key):
            spec = _parse_entry(str(key), body)
            if spec.name in specs:
                raise ParameterError(f'two measures are called "{spec.name}"', do="Name one: `NAME: {MEASURE: {}}`.")
        specs[spec.name] = spec
    return specs


def _parse_entry(key: str, body: Any) -> MeasureSpec:
    if key in MEASURES.table or ":" in key:
        return _parse_params(key, body, None)
    kind, params = next(iter(body.items())) if isinstance(body, Mapping) and len(body) == 1 else (key, body)
    if kind == key or not isinstance(params, Mapping | None):
        raise unknown("measure", key, MEASURES.table)
    if not re.fullmatch(r"[\w-]+", key) or key in _RESERVED:
        do = f"Use letters, digits, _ and -, but not {', '.join(_RESERVED)}."
        raise ParameterError(f'"{key}" cannot name a measure', do=do)
    with located(kind):
        return _parse_params(str(kind), params, key)


def _parse_params(path: str, params: Any, name: str | None) -> MeasureSpec:
    kind, params = load_class(MEASURES, path, Measure, params)  # type: ignore[type-abstract]
    if hidden := [key for key in params if key in kind.filled]:
        known = [item for item in names_of(kind) if item not in kind.filled]
        with located(hidden[0]):
            raise unknown(f"parameter of {kind.name}", hidden[0], known or ["(none)"])
    spec = MeasureSpec(name or kind.name, kind, params)
    _ = spec.draft  # refuses wrong parameters
    return spec


def with_upstream(names: Iterable[str], specs: Mapping[str, MeasureSpec] | None = None) -> dict[str, MeasureSpec]:
    """Measures by name, with those whose columns they read, and so on.

    A registered measure is the name of its default instance; `specs` are the instances of the recipe.

    Raises:
        UsageError: there is no such measure, or it needs a parameter.
    """
    given = specs or {}
    found: dict[str, MeasureSpec] = {}
    left = list(names)
    while left:
        name = left.pop(0)
        if name in found:
            continue
        if name not in given and name not in MEASURES.table:
            raise unknown("measure", name, [*given, *MEASURES.table])
        found[name] = given[name] if name in given else MeasureSpec(name, MEASURES.load(name))
        left += found[name].draft.upstream()
    for name, spec in found.items():
        # A measure of embeddings needs the encoder that made them, where that is not the recipe's scorer.
        encoders = [encoder for read in spec.draft.upstream() if (encoder := found[read].params.get("encoder"))]
        if encoders and "encoder" in spec.kind.filled:
            found[name] = replace(spec, params={**spec.params, "encoder": encoders[0]})
    return dict(sorted(found.items()))


def check_fields(columns: Iterable[str], specs: Mapping[str, MeasureSpec]) -> None:
    """Raises UsageError where a column (`clip.score`) is not one of its measure's. `specs`: see `with_upstream`."""
    for column in columns:
        name, dot, field = column.partition(".")
        known = specs[name].draft.fields() if dot and name in specs else ()
        if known and field not in known:
            do = f"It has: {', '.join(f'{name}.{each}' for each in known)}."
            raise UsageError(f'the measure "{name}" has no column "{field}"', do=do)


def make(spec: MeasureSpec, scorer: Callable[[], tuple[str, str]]) -> Measure:
    """The measure of a spec. `scorer` gives the recipe's scorer, as an encoder spec and the digest of its content; it
    is called only for a measure that needs an encoder and names none."""
    params = dict(spec.params)
    if spec.needs_scorer:
        params["encoder"], params["digest"] = scorer()
    elif params.get("encoder"):
        from winnow.pretrain.encoder import encoder_digest

        params["digest"] = encoder_digest(params["encoder"])
    return build(spec.kind, params, spec.name).named(spec.name)
