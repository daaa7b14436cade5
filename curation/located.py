"""Reading the parts of a recipe that name filters and measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from winnow.infra.errors import UsageError
from winnow.infra.params import ParameterError
from winnow.infra.registry import Registry

T = TypeVar("T")


@contextlib.contextmanager
def located(*keys: str | int) -> Iterator[None]:
    """UsageErrors of the block become ParameterErrors whose path starts with these keys."""
    try:
        yield
    except UsageError as error:
        found = error if isinstance(error, ParameterError) else ParameterError(error.what, do=error.do)
        raise found.below(*keys) from None


def load_class(registry: Registry, name: str, base: type[T], given: Any) -> tuple[type[T], Mapping[str, Any]]:
    """The class of a registered name or `module:Class`, and its parameters, {} for None.

    Raises:
        UsageError: there is no such class, it does not derive from `base` or is not decorated with `params`, or the
            parameters are not a mapping.
    """
    kind: Any = registry.load(name)
    word = base.__name__
    if not (isinstance(kind, type) and issubclass(kind, base) and hasattr(kind, "__pydantic_fields__")):
        do = f"A {word.lower()} derives from {base.__module__}.{word} and is decorated with winnow.infra.params.params."
        raise UsageError(f"{kind} is not a {word}", do=do)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        label = getattr(kind, "name", name)
        raise UsageError(f"{label}: parameters are written `name: value`, this is {given!r}")
    return kind, given
