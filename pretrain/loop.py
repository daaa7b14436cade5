"""The one loop: every process of every training runs `train`. It knows no objective by name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.pretrain.checkpoint.export import export
from winnow.pretrain.checkpoint.resume import Resume, Saved, no_space
from winnow.pretrain.config import TRAITS, PretrainConfig, build_params, check_traits
from winnow.pretrain.data.loader import Batches, Samples
from winnow.pretrain.engine.engine import Engine, learning_rate
from winnow.pretrain.monitor.flops import model_flops, peak_flops
from winnow.pretrain.monitor.report import LOG, Boards, Report, StepLog
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.objectives.base import Objective


@dataclass(frozen=True)
class Job:
    """One training; JSON values, so that it travels to any process.

    Attributes:
        config: `PretrainConfig` as a dict.
        pool, subset: URLs of an indexed pool and of a subset's .npy (None: the whole pool).
        out: URL of the training's directory.
        seed: of initialisation, order and augmentation.
        key: of the training's content; it resumes only from checkpoints of the same.
        note: URL of a progress note, or "".
    """

    config: dict[str, Any]
    pool: str
    subset: str | None
    out: str
    seed: int
    key: str = ""
    note: str = ""


def make_objective(config: PretrainConfig, seed: int) -> Objective:
    """The objective with its networks initialised from the seed alone; torch's global generator is left as it was."""
    cls = OBJECTIVES.load(config.objective_name)
    module = importlib.import_module(cls.__module__)
    params = build_params(module.Config, config.objective_params)
    try:  # the config was checked by what the source says; this is the class itself, with what it inherits
        traits = {name: getattr(cls, name) for name in TRAITS}
        traits["cacheable"] = vars(cls).get("cacheable", False)  # a subclass may have another loss
        check_traits(config, traits, vars(params))
    except ValueError as error:
        raise UsageError(str(error), where="pretrain") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective: Objective = cls(params, config.model.resolved(), config.augment)
    return objective.train()


def train(job: Job, device: torch.device, via: str) -> None:
    """Train to the end and export; the process group must be up, and all its processes call this with the same job.
    `via` says in the log who started them.

    On the CPU in float32, with the same number of processes and threads, an interrupted and resumed training ends in
    the same bits as an uninterrupted one.
    """
    config = PretrainConfig(**job.config)
    try:
        with _settings(config, device):
            _train(job, config, device, via)
    except Exception as error:
        reported = WinnowError(
            "no space left on the disk", where=job.out, do="Free some and run again: it goes on from there."
        )
        if (full := no_space(error, reported)) is not None:
            raise full from error
        raise


def _train(job: Job, config: PretrainConfig, device: torch.device, via: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    objective = make_objective(config, job.seed)
    with Resume(job.out, job.key, config.objective_name, config.keep_checkpoints) as resume:
        start, passed_over = resume.load(objective)
        engine = Engine(objective, config, device)
        if start is not None:
            engine.restore(start.tensors, start.scaler)
            start = Saved(start.step, {}, {}, start.state)
        first = start.step if start is not None else 0
        samples = Samples(job.pool, job.subset, config.sources)
        log = StepLog(storage.join(job.out, LOG), first, rank == 0)
        log.write(event="start", step=first, samples=len(samples), workers=world, via=via, device=device.type)
        for what in passed_over:
            log.write(event="checkpoint passed over", what=what)
        batches = Batches(
            samples,
            objective.views,
            seed=job.seed,
            batch=config.batch_size,
            rank=rank,
            world=world,
            first=first,
            last=config.steps,
            decoders=config.decoders,
            pin=device.type == "cuda",
        )
        saved = first if start is not None else None
        boards = Boards(config, job.out, job.key, first, rank == 0)
        with batches, contextlib.closing(boards):
            peak = peak_flops(device)
            report = Report(config, log, boards, job.note if rank == 0 else "", first, peak)
            if start is not None:
                report.take(start.state)
            for step, arrays in enumerate(batches, start=first):
                parts = _parts(arrays, config.accumulate * config.grad_cache, device)
                if step == first and peak is not None:
                    report.flops = _flops(config, job.seed, parts[0], device)
                # Dropout and the like draw from (seed, step, process), so there is no generator state to save.
                torch.manual_seed(((job.seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))
                lr = learning_rate(
                    step, steps=config.steps, lr=config.lr, warmup=config.warmup, schedule=config.schedule
                )
                want = report.wants(step + 1)
                losses, norm = engine.step(parts, step, lr, want)
                if want:
                    report.step(step + 1, losses, norm, lr, engine, batches)
                resume.check()
                if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    saved = step + 1
                    resume.save(engine, saved, report.state(batches))
            total = report.state(batches)
        if saved != config.steps:
            resume.save(engine, config.steps, total)
        training = {
            "seed": job.seed,
            "steps": config.steps,
            "samples_seen": config.steps * config.batch_size,
            "samples": len(samples),
            **total,
        }
        with engine.averaged():
            export(engine, config, job.out, training)
        resume.wait()
        log.write(event="end", **training)
        report.close()
        engine.close()


def _flops(config: PretrainConfig, seed: int, part: dict[str, torch.Tensor], device: torch.device) -> float | None:
    """Of a sample, counted on networks of their own for two of them."""
    return model_flops(make_objective(config, seed).to(device), {name: value[:2] for name, value in part.items()})


def _parts(arrays: dict[str, Any], parts: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    cut = {name: tensor.chunk(parts) for name, tensor in tensors.items()}
    return [{name: chunks[i] for name, chunks in cut.items()} for i in range(parts)]


@contextlib.contextmanager
def _settings(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """The process's threads and determinism, put back afterwards for those who train in their own process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    generator = torch.random.get_rng_state()
    torch.set_num_threads(config.threads)
    if device.type == "cpu":  # costs nothing there
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = filled
        torch.random.set_rng_state(generator)
