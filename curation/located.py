"""Where in a recipe an error belongs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from winnow.infra.errors import UsageError
from winnow.infra.params import ParameterError


@contextlib.contextmanager
def located(*keys: str | int) -> Iterator[None]:
    """UsageErrors of the block become ParameterErrors whose path starts with these keys."""
    try:
        yield
    except UsageError as error:
        found = error if isinstance(error, ParameterError) else ParameterError(error.what, do=error.do)
        raise found.below(*keys) from None
