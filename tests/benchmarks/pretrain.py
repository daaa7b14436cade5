"""Speed of pretraining next to open_clip's training loop and webdataset's loader, and on a GPU.

    python -m tests.benchmarks.pretrain loader --shards DIR
    python -m tests.benchmarks.pretrain train --shards DIR
    python -m tests.benchmarks.pretrain gpu --shards DIR

Run by hand, on a quiet machine. DIR has shards (`NAME.tar`, webdataset's). Each figure is the median of `--repeat`
runs, taken in turns in one process; a ratio is the median of the ratios of neighbouring runs. Starting up (processes,
the filling of shuffle buffers) is not counted: time runs from the tenth batch on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip_train.data import get_wds_dataset
from open_clip_train.train import train_one_epoch

from winnow.infra.io.images import decode_image
from winnow.infra.pool.index import IndexStage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.data.loader import Batches, Samples
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job, make_objective
from winnow.pretrain.objectives.base import Sample
from winnow.pretrain.sections import ParallelConfig

SKIPPED = 10  # batches before the clock starts
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 32, "width": 128, "heads": 2, "layers": 3},
}


class Clock:
    """Passes batches on and takes the time from the tenth to the last."""

    def __init__(self, batches: Iterable, count: int, **attributes: Any) -> None:
        self.batches, self.count, self.marks = batches, count, [0.0, 0.0]
        vars(self).update(attributes)

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(self.batches):
            if i == SKIPPED:
                self.marks[0] = time.perf_counter()
            if i == self.count:
                break
            yield batch
        self.marks[1] = time.perf_counter()

    def rate(self, batch: int) -> float:
        return (self.count - SKIPPED) * batch / (self.marks[1] - self.marks[0])


def in_turns(runs: dict[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    metrics: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeat):
        for name in runs if i % 2 == 0 else reversed(runs):
            metrics[name].append(runs[name]())
    return metrics


def table(title: str, metrics: dict[str, list[float]]) -> None:
    """Medians, spreads, and ratios to the last row."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}, webdataset {wds.__version__}"
    print(f"\n{title}\n{datetime.date.today()}, {processor}, {os.cpu_count()} cores, {versions}\n")
    base = list(metrics.values())[-1]
    for name, values in metrics.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        sem = f"({min(values):,.0f} to {max(values):,.0f})"
        print(f"  {name:<44} {statistics.median(values):>9,.0f} samples/s {sem:<20} {ratio:5.2f}")


def index(shards: str, folder: str) -> str:
    execute(IndexStage((shards,), folder), SerialExecutor())
    return folder


def loader(args: Namespace, pool: str, folder: Path) -> None:
    """Batches of decoded, cropped and tokenised samples, without a model."""
    logging.disable(logging.WARNING)
    config = PretrainConfig(model=MODEL, samples_seen=1 << 30, batch_size=args.batch)
    objective, samples = make_objective(config, seed=0), Samples(pool, None)
    tars = sorted(str(path) for path in Path(args.shards).glob("*.tar"))

    def ours() -> float:
        views = make_objective(config, seed=0).views  # with a cache of tokens as empty as that of new processes
        with Batches(
            samples, views, seed=0, batch=args.batch, last=args.steps + 1, num_workers=args.workers
        ) as batches:
            clock = Clock(batches, args.steps)
            for _ in clock:
                pass
        return clock.rate(args.batch)

    def reference(transform: Callable[[bytes, str], Any]) -> Callable[[], float]:
        def of(sample: dict[str, Any]) -> Any:
            return transform(sample["jpg"], sample["txt"].decode())

        def run() -> float:
            dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False).repeat()
            dataset = dataset.shuffle(1000).map(lambda sample: _with_jpg(sample)).map(of).batched(args.batch)
            batches = wds.WebLoader(dataset, batch_size=None, num_workers=args.workers)
            clock = Clock(batches, args.steps)
            for _ in clock:
                pass
            return clock.rate(args.batch)

        return run

    def same(data: bytes, text: str) -> tuple[np.ndarray, np.ndarray]:
        views = objective.views(Sample(image=decode_image(data), text=text), np.random.default_rng(0))
        return views["image"], views["text"]

    _, train_transform, _ = open_clip.create_model_and_transforms(
        "local-dir:" + str(_saved(folder)), load_weights=False
    )
    tokenizer = open_clip.get_tokenizer("local-dir:" + str(_saved(folder)))

    def its_own(data: bytes, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        return train_transform(decode_image(data)), tokenizer(text)[0]

    runs = {
        "winnow": ours,
        "webdataset, open_clip's transform": reference(its_own),
        "webdataset, the same decoding and transform": reference(same),
    }
    title = f"Loader: batches of {args.batch}, {args.workers} processes each"
    table(title, in_turns(runs, args.repeat))


def _with_jpg(sample: dict[str, Any]) -> dict[str, Any]:
    image = next(sample[ext] for ext in ("jpg", "jpeg", "png", "webp") if ext in sample)
    return {"jpg": image, "txt": sample["txt"]}


def _saved(folder: Path) -> Path:
    """The model as a folder that open_clip builds from."""
    place = folder / "model"
    place.mkdir(exist_ok=True)
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    return place


def train(args: Namespace, pool: str, folder: Path) -> None:
    """open_clip's `train_one_epoch` with its webdataset loader, and `winnow pretrain`."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    local = f"local-dir:{_saved(folder)}"
    tars = sorted(str(path) for path in Path(args.shards).glob("*.tar"))

    def reference() -> float:
        model, transform, _ = open_clip.create_model_and_transforms(
            local, load_weights=False, precision=args.precision, output_dict=True
        )
        given = Namespace(
            train_data="::".join(tars), train_num_samples=args.steps * args.batch, batch_size=args.batch,
            workers=args.workers, world_size=1, rank=0, seed=0, dataset_resampled=False, distributed=False,
            train_data_upsampling_factors=None, device="cpu", precision=args.precision, distill=False,
            skip_scheduler=False, accum_freq=1, horovod=False,
            grad_clip_norm=None, log_every_n_steps=10, wandb=False, local_loss=False, gather_with_grad=False,
        )  # fmt: skip
        data = get_wds_dataset(given, transform, True, tokenizer=open_clip.get_tokenizer(local))
        steps = data.dataloader.num_batches
        clock = Clock(data.dataloader, steps, num_batches=steps, num_samples=data.dataloader.num_samples)
        data.dataloader = clock
        plain = [p for p in model.parameters() if p.ndim < 2]
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
            lr=5e-4, betas=(0.9, 0.98), eps=1e-6,
        )  # fmt: skip
        scheduler = open_clip_scheduler(optimizer, steps)
        train_one_epoch(model, {"train": data}, open_clip.ClipLoss(), 0, optimizer, None, scheduler, None, given)
        return clock.rate(args.batch)

    config = PretrainConfig(
        model=MODEL, samples_seen=args.steps * args.batch, batch_size=args.batch, warmup_steps=5,
        precision={"amp_bf16": "bf16"}.get(args.precision, args.precision),
        parallel=ParallelConfig(device="cpu", threads=args.threads, num_workers=args.workers),
    )  # fmt: skip
    number = 0

    def ours() -> float:
        nonlocal number
        number += 1
        out = folder / f"run-{number}"
        launch([Job(config, pool, None, str(out), seed=0)], via="local")
        return rate(out, args.batch)

    loading = f"{args.workers} decoding processes each"
    title = f"Training: batches of {args.batch}, {args.precision}, {args.threads} threads, {loading}"
    table(title, in_turns({"winnow": ours, "open_clip's train_one_epoch": reference}, args.repeat))


def open_clip_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    from open_clip_train.scheduler import cosine_lr

    return cosine_lr(optimizer, 5e-4, 5, steps)


def steps_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line and line["step"] >= SKIPPED]


def rate(out: Path, batch: int) -> float:
    """Of a training, by the times in its log."""
    lines = steps_of(out)
    return (lines[-1]["step"] - lines[0]["step"]) * batch / (lines[-1]["time"] - lines[0]["time"])


def gpu(args: Namespace, pool: str, folder: Path) -> None:
    """CLIP in bf16 on one GPU."""
    name = torch.cuda.get_device_name()
    print(f"\nTraining CLIP on one {name}, bf16\n{datetime.date.today()}, torch {torch.__version__}\n")
    print(f"  {'model':<10} {'batch':>6} {'samples/s':>10} {'MFU':>7} {'peak GiB':>9} {'data wait':>10}")
    for model, batch in (("ViT-B-32", 2048), ("ViT-B-16", 512), ("ViT-L-14", 256)):
        out = folder / model
        config = PretrainConfig(
            model=model, samples_seen=args.steps * batch, batch_size=batch, warmup_steps=5, precision="bf16",
            parallel=ParallelConfig(device="cuda", threads=args.threads, num_workers=args.workers),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        launch([Job(config, pool, None, str(out), seed=0)], via="local")
        lines, memory = steps_of(out), torch.cuda.max_memory_allocated() / 2**30
        waiting = statistics.mean(line["data_wait"] for line in lines[1:])
        mfu = statistics.median(line["mfu"] or 0 for line in lines[1:])
        print(f"  {model:<10} {batch:>6} {rate(out, batch):>10,.0f} {mfu:>7.1%} {memory:>9.1f} {waiting:>10.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "train", "gpu"])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp_bf16"])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = index(args.shards, str(Path(folder) / "pool"))
        {"loader": loader, "train": train, "gpu": gpu}[args.what](args, pool, Path(folder))


if __name__ == "__main__":
    main()
