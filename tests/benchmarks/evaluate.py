"""What five checkpoints on many sets cost in one pass, against five passes of the plain loop, and on two workers.

    python -m tests.benchmarks.evaluate --data FOLDER [--checkpoints 5] [--tasks all]
    python -m tests.benchmarks.evaluate scaling --data FOLDER [--checkpoints 15] [--tasks all] [--workers 1,2]

The plain loop is what one writes with open_clip and webdataset (`plain` below): a process a checkpoint, decoding in
loader processes where a set has several shards. Both compute the same scores, which is checked.

`scaling` embeds the train splits too. For each number of workers it prints the time until the first unit ended, in
which a worker imports torch and open_clip and loads the checkpoints, and the time of the rest. Run
by hand, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.machine import run, table

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def plain(config: str, weights: str, data: str, tasks: list[str], workers: int, out: str) -> None:
    """One checkpoint on the classification and retrieval sets of a folder, as short as it can be written."""
    import open_clip
    import torch
    import torch.nn.functional as F
    import webdataset as wds

    open_clip.add_model_config(config)
    model, _, transform = open_clip.create_model_and_transforms(Path(config).stem, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(Path(config).stem)
    model.eval()
    found = {}
    for folder in sorted(Path(data).glob("wds_*_test")):
        name = folder.name[4:-5]
        if tasks != ["all"] and name not in tasks:
            continue
        shards = int((folder / "test" / "nshards.txt").read_text())
        urls = [str(folder / "test" / f"{i}.tar") for i in range(shards)]
        retrieval = (folder / "dataset_type.txt").exists()
        target = "txt" if retrieval else "cls"
        sets = (
            wds.WebDataset(urls, shardshuffle=False, nodesplitter=None).decode("pil").to_tuple("jpg;png;webp", target)
        )
        sets = sets.map_tuple(transform, None).batched(64, collation_fn=lambda rows: tuple(zip(*rows, strict=True)))
        loader = wds.WebLoader(sets, batch_size=None, num_workers=min(workers, shards))
        with torch.inference_mode():
            if not retrieval:
                names = (folder / "classnames.txt").read_text().splitlines()
                templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
                rows = []
                for word in names:
                    prompts = model.encode_text(tokenizer([t.replace("{c}", word) for t in templates]), normalize=True)
                    rows.append(F.normalize(prompts.mean(dim=0), dim=0))
                weight = torch.stack(rows)
            images, labels = [], []
            for batch_images, targets in loader:
                images.append(model.encode_image(torch.stack(batch_images), normalize=True))
                labels += targets
            features = torch.cat(images)
            if not retrieval:
                best = (features @ weight.T).argmax(dim=1)
                found[name] = float((best == torch.tensor(labels)).double().mean())
            else:
                texts = [(i, line) for i, text in enumerate(labels) for line in text.splitlines() if line.strip()]
                owner = torch.tensor([i for i, _ in texts])
                lines = [line for _, line in texts]
                parts = [
                    model.encode_text(tokenizer(lines[i : i + 64]), normalize=True) for i in range(0, len(lines), 64)
                ]
                scores = torch.cat(parts) @ features.T
                found[name] = float((scores.argmax(dim=1) == owner).double().mean())
    Path(out).write_text(json.dumps(found))


def checkpoints(folder: Path, count: int) -> tuple[str, list[str]]:
    """A config and that many state dicts of small CLIPs with random weights."""
    import open_clip
    import torch

    config = folder / "bench-clip.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    files = []
    for seed in range(count):
        torch.manual_seed(seed)
        files.append(str(folder / f"{seed}.pt"))
        torch.save(open_clip.create_model("bench-clip").state_dict(), files[-1])
    return str(config), files


def one_pass(
    config: str, files: list[str], data: str, tasks: str, out: Path, workers: int | None, protocols: str = "zeroshot"
) -> list[str]:
    """The command that evaluates them all: in this process alone, or on a Ray of that many workers."""
    code = (
        "import sys, ray, winnow.pipeline.cli\n"
        f"workers = {workers}\n"
        "if workers: ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "winnow.pipeline.cli.app(sys.argv[1:])\n"
    )
    words = ["evaluate", *(f"{config}:{file}" for file in files), "--data", data, "--tasks", tasks, "--out", str(out)]
    return [sys.executable, "-c", code, *words, "--protocols", protocols, "--executor", "ray" if workers else "serial"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("passes", "scaling"), default="passes")
    parser.add_argument("--data", required=True, help="folder of sets in DataComp's layout")
    parser.add_argument("--tasks", default="all", help="all, or names, comma-separated")
    parser.add_argument("--checkpoints", type=int, help="5; of scaling 15")
    parser.add_argument("--workers", default="1,2", help="of scaling: numbers of Ray workers, comma-separated")
    parser.add_argument("--plain", nargs=3, metavar=("CONFIG", "WEIGHTS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        config, weights, out = options.plain
        plain(config, weights, options.data, options.tasks.split(","), 2, out)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, files = checkpoints(folder, options.checkpoints or (15 if options.what == "scaling" else 5))
        if options.what == "scaling":
            counts = [int(count) for count in options.workers.split(",")]
            scaling(folder, config, files, options.data, options.tasks, counts)
        else:
            compare(folder, config, files, options.data, options.tasks)


def compare(folder: Path, config: str, files: list[str], data: str, tasks: str) -> None:
    """Plain passes against the one, and whether the scores agree."""
    import pyarrow.parquet as pq

    passes = []
    for file in files:
        words = ["--data", data, "--tasks", tasks, "--plain", config, file, f"{file}.json"]
        passes.append(run([sys.executable, "-m", "tests.benchmarks.evaluate", *words]))
    apart = sum(one.wall for one in passes)
    here = run(one_pass(config, files, data, tasks, folder / "serial", None))
    rows = pq.read_table(folder / "serial" / "scores.parquet").to_pylist()
    worst = 0.0
    for file in files:
        for task, value in json.loads(Path(f"{file}.json").read_text()).items():
            ours = [
                row
                for row in rows
                if row["checkpoint"].endswith(file)
                and row["task"].replace("/", "-") == task
                and row["metric"] in ("acc1", "image_retrieval_recall@1")
            ]
            worst = max(worst, abs(ours[0]["value"] - value) * ours[0]["n"])
    n = len(files)
    table(
        f"{n} checkpoints on {len({row['task'] for row in rows})} sets, zero-shot "
        f"(largest difference of a score: {worst:.0f} sample)",
        [
            ("", "wall s", "CPU s", "times"),
            (f"plain open_clip + webdataset, {n} passes", apart, sum(one.cpu for one in passes), 1.0),
            ("winnow evaluate, one pass, one process", here.wall, here.cpu, apart / here.wall),
        ],
    )


def scaling(folder: Path, config: str, files: list[str], data: str, tasks: str, workers: list[int]) -> None:
    """The embedding of all splits on Ray with each number of workers."""
    lines: list[tuple[object, ...]] = [
        ("Ray workers", "embedding s", "times", "until the first unit s", "after it s", "times")
    ]
    first: list[float] = []
    for count in workers:
        out = folder / f"ray-{count}"
        run(one_pass(config, files, data, tasks, out, count, "zeroshot,knn"))
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        events = [event for event in events if event.get("stage") == "embed"]
        began, ended = (next(e["time"] for e in events if e["event"] == which) for which in ("start", "done"))
        # A unit's record is the last of its files; records are written as the units end.
        units = [path.stat().st_mtime for path in (out / "features" / "units").rglob("*.json")]
        start = min(units) - began
        seconds, rest = ended - began, ended - began - start
        first = first or [seconds, rest]
        lines.append((count, seconds, first[0] / seconds, start, rest, first[1] / rest))
    table(f"{len(files)} checkpoints, test and train splits, on Ray", lines)


if __name__ == "__main__":
    main()
