"""How fast curation is, and how near to what the machine can do at most.

    python -m tests.benchmarks.curate clip_score --folder DIR     # draws metadata there, 2.6 GB at 12.8 M rows
    python -m tests.benchmarks.curate coarse
    python -m tests.benchmarks.curate basic --folder DIR
    python -m tests.benchmarks.curate assign
    python -m tests.benchmarks.curate series --folder DIR

Run by hand, on a quiet machine; every figure is the median of `--repeat` runs, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.machine import Run, run, table, winnow
from tests.benchmarks.metadata import write_metadata

_CLIP = "clip_score: {model: l14, fraction: 0.3}\n"
_COLUMNS = ["uid", "clip_l14_similarity_score"]
# A plain sketch of the same: two columns, one quantile, one sort. Also says what its parts take.
_SKETCH = """
import sys, glob
import numpy as np, pyarrow.parquet as pq
uids, scores = [], []
for path in sorted(glob.glob(sys.argv[1] + "/*.parquet"))[: int(sys.argv[3])]:
    table = pq.read_table(path, columns=["uid", "clip_l14_similarity_score"])
    scores.append(table["clip_l14_similarity_score"].to_numpy())
    data = b"".join(bytes.fromhex("".join(chunk.to_pylist())) for chunk in table["uid"].chunks)
    uids.append(np.frombuffer(data, ">u8").astype("u8").view("u8,u8"))
scores, uids = np.concatenate(scores), np.concatenate(uids)
place = int(len(scores) * 0.3)
threshold = -np.partition(-scores, place)[place]
kept = uids[scores >= threshold]
np.save(sys.argv[2], kept[np.lexsort((kept["f1"], kept["f0"]))])
"""


_RAY = """
import ray
ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
ray.get(ray.remote(lambda: 1).remote())
ray.shutdown()
"""


def _median(times: list[float]) -> float:
    return statistics.median(times)


def _files(folder: Path, rows: int) -> Path:
    """A folder with that many rows: links to the first files of the one they are drawn into."""
    write_metadata(folder / "all", rows)
    part = folder / f"first-{rows}"
    part.mkdir(exist_ok=True)
    for path in sorted((folder / "all").glob("*.parquet"))[: -(-rows // 10_000)]:
        link = part / path.name
        if not link.exists():
            link.hardlink_to(path)
    return part


def _curate(part: Path, text: str = _CLIP, *more: object) -> Callable[[], tuple[Run, bytes]]:
    def call() -> tuple[Run, bytes]:
        with tempfile.TemporaryDirectory() as out:
            (Path(out) / "filters.yaml").write_text(text)
            place = Path(out) / "subset"
            args = ("curate", part, "--filters", Path(out) / "filters.yaml", "--out", place)
            done = run(winnow(*args, *(more or ("--executor", "serial"))))
            return done, (place / "subset.npy").read_bytes()

    return call


def _sketch(part: Path) -> Callable[[], tuple[Run, bytes]]:
    def call() -> tuple[Run, bytes]:
        with tempfile.TemporaryDirectory() as out:
            place = Path(out) / "subset.npy"
            done = run([sys.executable, "-c", _SKETCH, str(part), str(place), "999999"])
            return done, place.read_bytes()

    return call


def clip_score(folder: Path, rows: int, repeat: int) -> None:
    """`clip_score: {fraction: 0.3}` from the start of the process to the sorted subset file."""
    part = _files(folder, rows)
    ways = {
        "winnow, serial": _curate(part),
        "winnow, default executor": _curate(part, _CLIP, "--max-skipped", "0.05"),
        "sketch": _sketch(part),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    files: set[bytes] = set()
    for _ in range(repeat):
        for name, way in ways.items():
            done, file = way()
            runs[name].append(done)
            files.add(file)
        runs.setdefault("Ray alone: start, an empty task, stop", []).append(run([sys.executable, "-c", _RAY]))
    header = ("", "wall s", "CPU s", "peak MB of one process")
    lines = [
        (name, _median([r.wall for r in found]), _median([r.cpu for r in found]), _median([r.memory for r in found]))
        for name, found in runs.items()
    ]
    table(f"CLIP score, fraction 0.3 of {rows:,} rows in {-(-rows // 10_000):,} files", [header, *lines])
    print("\n  subset files equal: " + ("yes" if len(files) == 1 else "NO"))
    _bound(part)


def _bound(part: Path) -> None:
    """What of the work cannot be left out, each alone on all cores: read, decode, sort, write."""
    from winnow.infra.io.prefetch import prefetch
    from winnow.infra.pool.uids import UID_DTYPE, sort_uids

    paths = sorted(part.glob("*.parquet"))
    size = 0
    for path in paths:
        meta = pq.ParquetFile(path).metadata
        for group in range(meta.num_row_groups):
            for i in range(meta.num_columns):
                column = meta.row_group(group).column(i)
                size += column.total_compressed_size if column.path_in_schema in _COLUMNS else 0

    def read(path: Path) -> int:
        return pq.ParquetFile(str(path), pre_buffer=False).read(_COLUMNS, use_threads=False).num_rows

    start = time.perf_counter()
    rows = sum(prefetch(read, paths))
    decoded = time.perf_counter() - start
    pairs = np.random.default_rng(0).integers(0, 2**64, (int(rows * 0.3), 2), np.uint64).view(UID_DTYPE).ravel()
    start = time.perf_counter()
    ordered = sort_uids(pairs)
    sort = time.perf_counter() - start
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile() as file:
        np.save(file, ordered)
        file.flush()
    written = time.perf_counter() - start
    started = run([sys.executable, "-c", "import numpy, pyarrow.parquet, pydantic, yaml, typer"]).wall
    lines = [
        ("start Python and import NumPy, pyarrow, pydantic, typer", started),
        (
            f"open {len(paths):,} files, read and decode {size / 1e6:,.0f} MB of two columns, pyarrow, all cores",
            decoded,
        ),
        (f"sort {len(pairs):,} uids", sort),
        (f"write {pairs.nbytes / 1e6:,.0f} MB", written),
        ("sum", started + decoded + sort + written),
    ]
    table("The bound: what cannot be left out", [("part", "s"), *lines])


def basic(folder: Path, rows: int, repeat: int) -> None:
    """The basic filter's columns and its decision, on one core, by the row."""
    import os

    from winnow.curation.filters.basic import Basic
    from winnow.curation.measures.base import Samples
    from winnow.curation.measures.caption import Caption
    from winnow.curation.measures.language import Language
    from winnow.infra.pool.pool import Pool

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    shards = Pool.open(str(_files(folder, rows))).shards
    Language().compute(Samples(shards[0].table(["text"]).slice(0, 10), []))  # loads the model
    times: dict[str, float] = {"read": 0.0, "caption": 0.0, "decide": 0.0, "language": 0.0, "identifier alone": 0.0}
    seen = 0
    from winnow.curation.measures.language import _load

    predict = _load(None).predict
    for shard in shards:
        begin = time.perf_counter()
        part = shard.table(["uid", "text", "original_width", "original_height"])
        read = time.perf_counter()
        counts = Caption().compute(Samples(part, []))
        counted = time.perf_counter()
        times["read"] += read - begin
        times["caption"] += counted - read
        language = Language().compute(Samples(part, []))
        spoken = time.perf_counter()
        times["language"] += spoken - counted
        names = {f"caption.{name}": counts[name] for name in counts.column_names}
        names |= {f"language.{name}": language[name] for name in language.column_names}
        whole = pa.table({name: part[name] for name in part.column_names} | names)
        begin = time.perf_counter()
        Basic().mask(whole, {})
        times["decide"] += time.perf_counter() - begin
        if shard is shards[0]:
            texts = [text.replace("\n", " ") for text in part["text"].to_pylist()]
            begin = time.perf_counter()
            for text in texts:
                predict(text)
            alone = time.perf_counter() - begin
        seen += part.num_rows
    without = times["read"] + times["caption"] + times["decide"]
    lines = [
        ("read, count, decide (without language)", seen / without),
        ("language step", seen / times["language"]),
        ("the identifier alone, its `predict` in a loop", len(texts) / alone),
    ]
    table(f"basic filter, {seen:,} rows, one core", [("part", "rows/s"), *lines])


def assign(rows: int, clusters: int, dim: int, repeat: int) -> None:
    """Nearest of many centroids against the machine's matrix products."""
    import torch

    from winnow.curation.search.centroids import NearestCentroid

    rng = np.random.default_rng(0)
    vectors = np.empty((rows, dim), np.float16)
    for start in range(0, rows, 50_000):
        part = rng.standard_normal((min(50_000, rows - start), dim), np.float32)
        vectors[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    centroids = rng.standard_normal((clusters, dim), np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    rates: dict[str, list[float]] = {"torch": [], "numpy": [], "assign": []}
    block = vectors[:8192].astype(np.float32)
    a, b = torch.from_numpy(block), torch.from_numpy(centroids)
    out, array = torch.empty(len(block), clusters), np.empty((len(block), clusters), np.float32)
    nearest = NearestCentroid(centroids, "exact")
    calls = {"torch": lambda: torch.mm(a, b.T, out=out), "numpy": lambda: np.dot(block, centroids.T, out=array)}
    for _ in range(repeat):
        for start in range(0, rows, 50_000):  # in turns, as the machine's rate drifts
            for name, call in calls.items():
                call()
                begin = time.perf_counter()
                call()
                rates[name].append(2 * len(block) * clusters * dim / (time.perf_counter() - begin) / 1e9)
            part = vectors[start : start + 50_000]
            begin = time.perf_counter()
            nearest(part)
            rates["assign"].append(2 * len(part) * clusters * dim / (time.perf_counter() - begin) / 1e9)
    best = max(_median(rates["torch"]), _median(rates["numpy"]))
    lines = [(name, _median(found), f"{_median(found) / best:.0%}") for name, found in rates.items()]
    table(
        f"{rows:,} x {dim} float16 embeddings to {clusters:,} centroids",
        [("", "GFLOP/s", "of the best product"), *lines],
    )


def coarse(rows: int, clusters: int, dim: int) -> None:
    """The inverted file's recall and speed against the exhaustive search, embeddings in groups as images lie."""
    from winnow.curation.search.centroids import NearestCentroid

    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((max(clusters // 20, 1), dim), np.float32)

    def draw(n: int) -> np.ndarray:
        found = kinds[rng.integers(0, len(kinds), n)] + 0.7 * rng.standard_normal((n, dim), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    centroids, vectors = draw(clusters), draw(rows).astype(np.float16)
    start = time.perf_counter()
    search = NearestCentroid(centroids, "coarse")
    search.tune(vectors)
    built = time.perf_counter() - start
    start = time.perf_counter()
    found = search(vectors)
    fast = time.perf_counter() - start
    exact = NearestCentroid(centroids, "exact")
    batch = vectors[: min(rows, 4096)]
    start = time.perf_counter()
    truth = exact(batch)
    slow = (time.perf_counter() - start) / len(batch) * rows
    lines = [
        ("build and tune, s", built),
        (f"lists looked into, of {search._index.nlist:,}", search.probes),
        ("recall on the tuning sample", f"{search.recall:.3f}"),
        ("recall on other vectors", f"{np.mean(found[: len(batch)] == truth):.3f}"),
        ("coarse, vectors/s", rows / fast),
        ("exact, vectors/s", rows / slow),
    ]
    table(f"{clusters:,} centroids of {dim} dimensions", [("", ""), *lines])


def series(folder: Path, rows: int, repeat: int) -> None:
    """Time and memory against rows."""
    sizes = [n for n in (1_280_000, 2_560_000, 5_120_000, 12_800_000) if n <= rows]
    found: dict[int, list[Run]] = {n: [] for n in sizes}
    parts = {n: _files(folder, n) for n in sizes[::-1]}
    for _ in range(repeat):
        for n in sizes:
            found[n].append(_curate(parts[n])()[0])
    walls = [_median([r.wall for r in found[n]]) for n in sizes]
    memory = [_median([r.memory for r in found[n]]) for n in sizes]
    slope, start = np.polyfit(np.array(sizes) / 1e6, walls, 1)
    growth = np.polyfit(np.array(sizes) / 1e6, memory, 1)[0]
    lines = [
        (f"{n:,}", wall, wall / n * 1e6, f"{mb:,.0f}", f"{0.3 * n * 16 / 1e6:,.0f}")
        for n, wall, mb in zip(sizes, walls, memory, strict=True)
    ]
    header = ("rows", "wall s", "s a million rows", "peak MB", "of which the subset itself MB")
    table("CLIP score, fraction 0.3, against rows", [header, *lines])
    print(f"\n  slope {slope:.3f} s a million rows after {start:.2f} s of start; memory {growth:.1f} MB a million rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["clip_score", "basic", "assign", "coarse", "series"])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-metadata"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--clusters", type=int)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "clip_score":
        clip_score(args.folder, args.rows or 12_800_000, args.repeat)
    elif args.what == "series":
        series(args.folder, args.rows or 12_800_000, args.repeat)
    elif args.what == "basic":
        basic(args.folder, args.rows or 1_280_000, args.repeat)
    elif args.what == "assign":
        assign(args.rows or 1_000_000, args.clusters or 10_000, args.dim, args.repeat)
    else:
        coarse(args.rows or 100_000, args.clusters or 100_000, args.dim)


if __name__ == "__main__":
    main()
