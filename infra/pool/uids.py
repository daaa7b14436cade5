"""Sample ids: 128 bits, 32 hex characters in columns, NumPy `u8,u8` pairs in subset files (DataComp's format)."""

from __future__ import annotations

import binascii
import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import Column, one_chunk
from winnow.infra.io.storage import read_bytes, writing
from winnow.infra.stages.kept import check_kept

UID_DTYPE = np.dtype("u8,u8")

_HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_DIGITS = set("0123456789abcdefABCDEF")


def decode_uids(column: Column) -> np.ndarray:
    """Hex uids to pairs of 64-bit halves, vectorised.

    Returns:
        dtype `u8,u8`, shape [n]: (first 16 digits, last 16 digits), as DataComp's subset files hold them.

    Raises:
        WinnowError: a uid is null, not 32 characters long, or not hexadecimal.
    """
    array = one_chunk(column)
    if not pa.types.is_string(array.type):
        array = _as_digits(array)
    n = len(array)
    if n == 0:
        return np.empty(0, dtype=UID_DTYPE)
    if array.null_count:
        raise WinnowError(f"{array.null_count} of {n} uids are null")
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32, count=n + 1, offset=array.offset * 4)
    if data_buffer is None or not np.all(np.diff(offsets) == 32):
        bad = int(np.argmax(np.diff(offsets) != 32))
        raise WinnowError(f'uid "{array[bad].as_py()}" is not 32 characters long')
    start = int(offsets[0])
    try:
        octets = binascii.unhexlify(memoryview(data_buffer)[start : start + 32 * n])
    except (binascii.Error, ValueError):
        bad = next(i for i, uid in enumerate(array.to_pylist()) if set(uid) - _DIGITS)
        raise WinnowError(f'uid "{array[bad].as_py()}" is not hexadecimal') from None
    return np.frombuffer(octets, dtype=">u8").astype("u8").view(UID_DTYPE)


def _as_digits(array: pa.Array) -> pa.StringArray:
    """Uids of other types of string, and of 16 bytes, as 32 digits."""
    try:
        octets = pa.types.is_fixed_size_binary(array.type) or pa.types.is_binary(array.type)
        if octets and pc.min_max(pc.binary_length(array)).as_py() == {"min": 16, "max": 16}:
            return pa.array([None if uid is None else uid.hex() for uid in array.to_pylist()], pa.string())
        return array.cast(pa.string())
    except pa.ArrowException:
        raise WinnowError(f"uids have the type {array.type}", do="A uid is text of 32 hexadecimal digits.") from None


def encode_uids(uids: np.ndarray) -> list[str]:
    """The inverse of `decode_uids`: 32 lower-case hex characters each."""
    halves = np.ascontiguousarray(uids).view("u8").reshape(-1, 2).astype(">u8")
    octets = halves.view(np.uint8).reshape(-1, 16)
    digits = np.empty((len(octets), 32), dtype=np.uint8)
    digits[:, 0::2], digits[:, 1::2] = _HEX[octets >> 4], _HEX[octets & 15]
    return [row.decode() for row in digits.view("S32").ravel()]


def uid_column(uids: np.ndarray) -> pa.StringArray:
    """`encode_uids` as an Arrow column, without the pandas that `pyarrow.array` imports."""
    offsets = np.arange(0, 32 * len(uids) + 1, 32, dtype=np.int32)
    data = "".join(encode_uids(uids)).encode()
    return pa.Array.from_buffers(pa.string(), len(uids), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def derived_uid(*parts: str) -> str:
    """A uid that depends on the given strings alone: the first 128 bits of their sha256."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def sort_uids(uids: np.ndarray) -> np.ndarray:
    """Sorted copy, first half before second, as DataComp's `np.sort` of the `u8,u8` array gives.

    NumPy compares such pairs one by one. Instead the leading bits of the first half are sorted as integers that carry
    the row number in their low bits; the few rows whose leading bits agree are put in order afterwards.
    """
    n = len(uids)
    if n < 2 or (uids["f0"][1:] > uids["f0"][:-1]).all():
        return uids.copy()
    low = np.uint64((n - 1).bit_length())
    rows = np.uint64((1 << int(low)) - 1)
    keys = uids["f0"] & ~rows
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    tied = _tied(keys, low)
    keys &= rows
    # A complex number is 16 bytes too, and NumPy copies it faster than a pair.
    pairs = np.ascontiguousarray(uids).view(np.complex128)
    ordered = pairs.take(keys.view(np.int64)).view(UID_DTYPE)
    if len(tied):
        rows = ordered[tied]
        ordered[tied] = rows[np.lexsort((rows["f1"], rows["f0"]))]
    return ordered


def split_repeated(uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct uids, sorted, and those that occur before, once for each time that they do."""
    ordered = sort_uids(uids)
    again = np.zeros(len(ordered), dtype=bool)
    again[1:] = (ordered["f0"][1:] == ordered["f0"][:-1]) & (ordered["f1"][1:] == ordered["f1"][:-1])
    return (ordered[~again], ordered[again]) if again.any() else (ordered, ordered[:0])


def _tied(keys: np.ndarray, low: np.uint64, block: int = 1 << 18) -> np.ndarray:
    """Positions in sorted keys that agree with a neighbour in all but their low bits; int64."""
    found = []
    for start in range(0, len(keys) - 1, block):
        leading = keys[start : start + block + 1] >> low
        found.append(np.flatnonzero(leading[1:] == leading[:-1]) + start)
    first = np.concatenate(found)
    return np.union1d(first, first + 1)


def is_member(uids: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """Whether each uid is in a sorted subset; bool, shape [n]."""
    if len(subset) == 0:
        return np.zeros(len(uids), dtype=bool)
    lo = np.searchsorted(subset["f0"], uids["f0"], side="left")
    hi = np.searchsorted(subset["f0"], uids["f0"], side="right")
    mask = (hi > lo) & (subset["f1"][np.minimum(lo, len(subset) - 1)] == uids["f1"])
    for i in np.nonzero(hi - lo > 1)[0]:
        mask[i] = uids["f1"][i] in subset["f1"][lo[i] : hi[i]]
    return mask


def distinct_uids(subset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sorted subset's distinct uids, and how often it has each."""
    if not len(subset):
        return subset, np.empty(0, np.int64)
    starts = np.nonzero(np.concatenate([[True], subset[1:] != subset[:-1]]))[0]
    return subset[starts], np.diff(np.append(starts, len(subset)))


def times_listed(uids: np.ndarray, distinct: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each uid would be in the subset, and how often it is there; int64 [n] each."""
    if not len(distinct):
        return np.zeros(len(uids), np.int64), np.zeros(len(uids), np.int64)
    # By the first half, since NumPy compares pairs slowly; pairs only where two uids share it.
    at = np.minimum(np.searchsorted(np.ascontiguousarray(distinct["f0"]), uids["f0"]), len(distinct) - 1)
    alike = (distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] != uids["f1"])
    at[alike] = np.minimum(np.searchsorted(distinct, uids[alike]), len(distinct) - 1)
    return at, np.where((distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] == uids["f1"]), counts[at], 0)


def hash_unit(uids: np.ndarray, seed: int, salt: str = "") -> np.ndarray:
    """A number in [0, 1) for each uid, uniform over seeds and salts and independent of the order of the uids.

    The two halves are mixed with the salted seed by the finaliser of splitmix64. float64, shape [n].
    """
    mark = int.from_bytes(hashlib.sha256(f"{seed}/{salt}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = uids["f0"] ^ np.uint64(mark)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = (x ^ (x >> np.uint64(31))) + uids["f1"]
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = x ^ (x >> np.uint64(27))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def save_subset(url: str, uids: np.ndarray) -> None:
    """Write a subset file: the sorted `u8,u8` array in .npy."""
    with writing(url) as path, open(path, "wb") as file:
        np.save(file, sort_uids(uids))


def load_subset(url: str) -> np.ndarray:
    """Read a subset file. Raises WinnowError when it is not one, or is damaged."""
    try:
        uids = np.load(io.BytesIO(read_bytes(check_kept(url))), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise WinnowError(f"is not a NumPy file ({error})", where=url) from error
    if not isinstance(uids, np.ndarray):
        raise WinnowError("is not a NumPy array", where=url)
    if uids.dtype != UID_DTYPE or uids.ndim != 1:
        raise WinnowError(f"holds {uids.dtype} of shape {uids.shape}, a subset is a one-dimensional u8,u8", where=url)
    return sort_uids(uids)
