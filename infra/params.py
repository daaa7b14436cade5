"""Typed parameters: what a recipe says is checked once, where it is read, and refused in a sentence.

A class whose fields a recipe may set (a filter, a measure, the `Config` of an objective) is decorated with `params`;
sections of the recipe derive from `Section`. Types are strict (no text for a number, no fraction for an integer, no
`true` for 1), unknown names are refused, bounds are part of the annotation:

    >>> @params
    ... class Sharpness:
    ...     fraction: float = pydantic.Field(0.5, gt=0, le=1)
    >>> build(Sharpness, {"fraction": 0.3}, "sharpness")
    Sharpness(fraction=0.3)
    >>> build(Sharpness, {"fractoin": 0.3}, "sharpness")
    Traceback (most recent call last):
    winnow.infra.params.ParameterError: unknown parameter of sharpness "fractoin". Did you mean "fraction"?
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from winnow.infra.errors import UsageError
from winnow.infra.registry import closest_word, unknown

T = TypeVar("T")
Path = tuple[str | int, ...]

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# What a value must be, by pydantic's name of the error.
_WANTED = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("dict_type", "model_type", "dataclass_type"), "a mapping of names to values"),
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "a list"),
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "none_required": "null",
    "callable_type": "a callable",
    "too_short": "longer",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


class ParameterError(UsageError):
    """A parameter that is refused.

    Attributes:
        path: keys and indices from what was built to the value, to find its line in a file.
    """

    path: Path = ()

    def below(self, *keys: str | int) -> ParameterError:
        """The same error, seen from further outside."""
        self.path = (*keys, *self.path)
        return self


class InvalidValue(ValueError):
    """For validators of a `Section` or `params` class: a `ValueError` that says which value below it is wrong.

    `what` is a sentence without a full stop, `path` the keys and indices from the class to the value.
    """

    def __init__(self, what: str, *path: str | int, do: str | None = None) -> None:
        super().__init__(what)
        self.what, self.path, self.do = what, path, do


@dataclass_transform(frozen_default=True, field_specifiers=(pydantic.Field,))
def params(cls: type[T]) -> type[T]:
    """Make a class a frozen, strict pydantic dataclass. Compare `dataclasses.dataclass(frozen=True)`."""
    return dataclass(frozen=True, config=_STRICT)(cls)  # type: ignore[return-value]


class Section(BaseModel):
    """A mapping of a recipe: strict types, unknown keys forbidden, frozen."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), **_STRICT)
    renamed: ClassVar[Mapping[str, str]] = {}  # former names of keys, with the new ones, for the message


def build(kind: type[T], given: Mapping[str, Any], label: str) -> T:
    """An instance of a `params` class or `Section` from values by name, as YAML holds them (lists become tuples).

    Args:
        kind: the class.
        given: values by name.
        label: the name of the class in messages.

    Raises:
        ParameterError: a name is unknown or missing, or a value is refused; with the path to it.
    """
    try:
        if issubclass(kind, BaseModel):
            return kind.model_validate(tuples(given))
        for key in given:
            if not isinstance(key, str):
                raise ParameterError(f"{label}: names are text, {key!r} is not")
        return kind(**tuples(given))
    except ValidationError as error:
        raise refusal(error, kind, given, label) from None


def tuples(value: Any) -> Any:
    """The value with every list as a tuple; mappings are copied."""
    return _converted(value, tuple)


def lists(value: Any) -> Any:
    """The value with every tuple as a list, as YAML and JSON hold it."""
    return _converted(value, list)


def _converted(value: Any, kind: type) -> Any:
    if isinstance(value, Mapping):
        return {key: _converted(item, kind) for key, item in value.items()}
    return kind(_converted(item, kind) for item in value) if isinstance(value, (list, tuple)) else value


def names_of(kind: type) -> list[str]:
    """The parameters of a `params` class or `Section`."""
    return list(_fields(kind))


def _fields(kind: Any) -> Mapping[str, Any]:
    return getattr(kind, "model_fields", None) or getattr(kind, "__pydantic_fields__", {})


def refusal(error: ValidationError, kind: type, given: Any, label: str = "") -> ParameterError:
    """A ValidationError's first fault as one sentence; a misspelt name comes before what may follow from it."""
    fault: Any = min(error.errors(), key=lambda item: item["type"] not in _UNKNOWN)
    path = _within(fault["loc"], given, fault["type"])
    name = ".".join(map(str, path)) or label
    renamed = getattr(_kind_at(kind, path[:-1]), "renamed", {})
    if fault["type"] in _UNKNOWN and path[-1] in renamed:
        result = ParameterError(f"`{path[-1]}` is now `{renamed[str(path[-1])]}`")
    elif fault["type"] in _UNKNOWN:
        of = f"parameter of {label}" if label else "key"
        near = unknown(of, str(path[-1]), names_of(_kind_at(kind, path[:-1])) or ["(none)"])
        result = ParameterError(near.what, do=near.do)
    elif fault["type"] in _MISSING:
        result = ParameterError(f'{label} needs "{name}"' if label else f'"{name}" is missing')
    elif fault["type"] == "value_error":
        cause = fault["ctx"]["error"]  # raised by a validator of the class
        known = isinstance(cause, (UsageError, InvalidValue))
        what, do = (cause.what, cause.do) if known else (str(cause), None)
        result = ParameterError(f"{label}: {what}" if label and label not in what else what, do=do)
        path += getattr(cause, "path", ())
    else:
        result = _wrong_value(fault, f"{label}: {name}" if label and name != label else name)
    result.path = path
    return result


def _wrong_value(fault: Any, title: str) -> ParameterError:
    value, what = fault["input"], fault["type"]
    if what == "literal_error":
        expected = fault["ctx"]["expected"].replace(" or ", ", ")
        near = closest_word(str(value), expected.replace("'", "").split(", "))
        do = f'Did you mean "{near}"?' if near else None
        return ParameterError(f"{title} must be one of {expected}, not {value!r}", do=do)
    if what in _BOUNDS:
        key, words = _BOUNDS[what]
        return ParameterError(f"{title} must be {words} {fault['ctx'][key]:g}, not {value!r}")
    if what in _WANTED:
        example = _WANTED[what] == "a list" and isinstance(value, (int, float, str))
        hint = f" (write [{value!r}])" if example else ""
        return ParameterError(f"{title} must be {_WANTED[what]}, not {value!r}{hint}")
    return ParameterError(f"{title}: {fault['msg'][0].lower()}{fault['msg'][1:]}, not {value!r}")


def _within(loc: Sequence[str | int], given: Any, what: str) -> Path:
    """The part of pydantic's location that leads through the given value; it also names branches of unions."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(given, Mapping):
            known = part in given
        else:
            known = isinstance(given, (list, tuple)) and isinstance(part, int) and part < len(given)
        if known:
            given = given[part]
        elif what not in _MISSING or part != loc[-1]:
            continue
        path.append(part)
    return tuple(path)


def _kind_at(kind: Any, path: Path) -> Any:
    """The class that holds the names at a path below a class, as far as annotations say."""
    for part in path:
        if fields := _fields(kind):
            info = fields.get(str(part))
            kind = info.annotation if info else None
        elif typing.get_origin(kind) in (dict, Mapping):
            kind = typing.get_args(kind)[1]
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            classes = [arg for arg in typing.get_args(kind) if names_of(arg)] if kind else []
            kind = classes[0] if classes else None
    return kind
