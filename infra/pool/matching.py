"""Which row of a parquet belongs to which sample of a tar: by uid, key, url, sha256, or a caption that is unique."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from winnow.infra.io.tar import split_name
from winnow.infra.stages.stage import Skipped

ONLY_PARQUET = "in the parquet but not in the tar"
Facts = Mapping[str, Any]  # of a sample in the tar: "key", and "uid", "url", "sha256" and "text" as far as it has them
Words = Sequence[str | None]
_Value = Callable[[Facts], str | None]


class Matching:
    """The samples of a tar and the rows of a parquet with equal values of one identity.

    Args:
        by: name of the identity.
        value: the value of a sample.
        values: those of the parquet's rows; None matches nothing.
        samples: of the tar.
        raw: what the values were made of. Of rows whose value and raw value are equal the first counts; a value of
            other rows, or of several samples, decides on nothing. None: neither does the value of equal rows.

    Attributes:
        found: row of each sample; -1 for none, -2 where the value is not unique.
        count: of samples that have a row.
    """

    def __init__(
        self,
        by: str,
        value: _Value,
        values: Words,
        samples: Sequence[Facts],
        raw: Words | None = None,
    ) -> None:
        self.by, self._value, self._values = by, value, values
        index: dict[str, int] = {}
        self._again = [at for at, one in enumerate(values) if one is not None and index.setdefault(one, at) != at]
        wanted = [value(sample) for sample in samples]
        twice = {one for at in self._again if (one := values[at]) and (raw is None or raw[at] != raw[index[one]])}
        several: Counter[str | None] = Counter()
        if twice or (by != "uid" and len(set(wanted)) < len(wanted)):  # a sample with the uid of another is a duplicate
            times = Counter(wanted)
            several.update({one: n for one, n in times.items() if one in index and (n > 1 or one in twice)})
        self._several = several
        self.found = [-1 if one is None else -2 if one in several else index.get(one, -1) for one in wanted]
        self.count = sum(at >= 0 for at in self.found)

    def reason(self, at: int) -> str | None:
        """Why a sample is without a row, by its `found`; None if it has one."""
        return None if at >= 0 else f"{self.by} is not unique" if at == -2 else "in the tar but not in the parquet"

    def left_over(self, shard: str, unusable: Collection[Facts]) -> Iterator[Skipped]:
        """The rows of the parquet without a sample, and further rows with the same value, except the rows of samples
        that have been skipped: `unusable`, and those whose value is not unique."""
        if self.count == len(self._values) and not self._again:
            return
        used = {self._values[at] for at in self.found if at >= 0} | {self._value(facts) for facts in unusable}
        again, spare = set(self._again), Counter(self._several)
        for at, value in enumerate(self._values):
            if spare[value] > 0:
                spare[value] -= 1
                continue
            where = f"{shard}/{f'row {at}' if value is None else value}"
            if at in again:
                yield Skipped(where, f"duplicate {self.by} in the parquet")
            elif value is None or value not in used:
                yield Skipped(where, f"{ONLY_PARQUET} (by {self.by})")


def best_matching(samples: Sequence[Facts], columns: Mapping[str, Words], numbers: bool = False) -> Matching | None:
    """The matching with the most samples, of equal ones the first; None if there is nothing to match by.

    Args:
        columns: of the parquet, by name: any of "uid", "key", "url", "sha256" and "text".
        numbers: whether the keys were whole numbers, so that leading zeros are not known.
    """
    best = None
    for by, value, values, raw in _identities(samples, columns, numbers):
        if by == "caption" and best is not None and best.count:  # a caption only identifies where nothing else does
            break
        matching = Matching(by, value, values, samples, raw)
        if best is None or matching.count > best.count:
            best = matching
        if best.count == len(samples):
            break
    return best


def _identities(
    samples: Sequence[Facts], columns: Mapping[str, Words], numbers: bool
) -> Iterator[tuple[str, _Value, Words, Words | None]]:
    """What `Matching` takes, for each identity that both sides may have."""
    if "uid" in columns and (not samples or any(sample["uid"] for sample in samples)):
        yield "uid", _fact("uid"), columns["uid"], columns["uid"]
    for form in (_NUMBERS if numbers else _KEYS) if "key" in columns else ():
        yield "key", _key(form), [None if key is None else form(key) for key in columns["key"]], columns["key"]
    for name in ("url", "sha256"):
        if name in columns and (not samples or any(name in sample for sample in samples)):
            yield name, _fact(name), columns[name], None
    if "text" in columns and any(sample["text"] is not None for sample in samples):
        captions = [caption_of(text) for text in columns["text"]]
        yield "caption", lambda sample: caption_of(sample.get("text")), captions, None


def _fact(name: str) -> _Value:
    return lambda sample: sample.get(name)


def _key(form: Callable[[str], str]) -> _Value:
    return lambda sample: form(sample["key"])


def caption_of(text: str | None) -> str | None:
    """A caption without what editors and writers of files add: a byte order mark and the last line end."""
    return None if text is None else text.removeprefix("\ufeff").rstrip("\r\n")


def _path(key: str) -> str:
    return split_name(key.removeprefix("./"))[0] or key


def _name(key: str) -> str:
    return _path(key).rpartition("/")[2]


def _unpadded(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.lstrip("0") or "0" if name.isdecimal() else name)


# How keys are compared, in order: as written; without "./" and extension; without leading zeros; without folders.
_NUMBERS: tuple[Callable[[str], str], ...] = (lambda key: _unpadded(_path(key)), lambda key: _unpadded(_name(key)))
_KEYS: tuple[Callable[[str], str], ...] = (str, _path, _NUMBERS[0], _name, _NUMBERS[1])
