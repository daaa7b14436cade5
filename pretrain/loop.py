"""The one loop: every process of every training runs `train`. It knows no objective by name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from infra import storage
from infra.errors import UsageError
from pretrain.checkpoint import Resume, export
from pretrain.config import PretrainConfig, build_params
from pretrain.data import Batches, Samples
from pretrain.engine import Engine, learning_rate
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.base import Objective
from pretrain.report import LOG, Report, StepLog


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
    if config.accumulate > 1 and cls.couples_batch:
        raise UsageError(
            f"the loss of {config.objective_name} couples the samples of a batch, so it cannot be cut in parts",
            where="accumulate",
            do="Use more workers, or a smaller batch_size.",
        )
    module = importlib.import_module(cls.__module__)
    params = build_params(module.Config, config.objective_params)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective: Objective = cls(params, config.model.open_clip_config(), config.augment)
    return objective.train()


def train(job: Job, device: torch.device, via: str) -> None:
    """Train to the end and export; the process group must be up, and all its processes call this with the same job.
    `via` says in the log who started them.

    On the CPU in float32, with the same number of processes and threads, an interrupted and resumed training ends in
    the same bits as an uninterrupted one.
    """
    config = PretrainConfig(**job.config)
    rank, world = dist.get_rank(), dist.get_world_size()
    with _settings(config, device):
        engine = Engine(make_objective(config, job.seed), config, device)
        resume = Resume(job.out, job.key, config.keep_checkpoints)
        state, passed_over = resume.load(engine)
        first, replaced = (state["step"], state["replaced"]) if state else (0, 0)
        samples = Samples(job.pool, job.subset)
        log = StepLog(storage.join(job.out, LOG), first, rank == 0)
        log.write(event="start", step=first, samples=len(samples), workers=world, via=via, device=device.type)
        for what in passed_over:
            log.write(event="checkpoint passed over", what=what)
        report = Report(config, log, job.note if rank == 0 else "", first, replaced)
        if state:
            report.losses = state["losses"]
        batches = Batches(
            samples,
            engine.objective.views,
            seed=job.seed,
            batch=config.batch_size,
            rank=rank,
            world=world,
            first=first,
            last=config.steps,
            threads=config.decoders,
        )
        saved = first if state else None
        with batches:
            for step, arrays in enumerate(batches, start=first):
                # Dropout and the like draw from (seed, step, process), so there is no generator state to save.
                torch.manual_seed((job.seed * 1_000_003 + step) * 65_537 + rank)
                lr = learning_rate(
                    step, steps=config.steps, lr=config.lr, warmup=config.warmup, schedule=config.schedule
                )
                want = report.wants(step + 1)
                losses, norm = engine.step(_parts(arrays, config.accumulate, device), step, lr, want)
                if want:
                    report.step(step + 1, losses, norm, lr, engine, batches)
                if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    saved = step + 1
                    so_far = {"step": saved, "replaced": report.replaced(batches), "losses": report.losses}
                    resume.save(engine, saved, so_far)
        total = report.replaced(batches)
        if saved != config.steps:
            resume.save(engine, config.steps, {"step": config.steps, "replaced": total, "losses": report.losses})
        training = {
            "seed": job.seed,
            "steps": config.steps,
            "samples_seen": config.steps * config.batch_size,
            "samples": len(samples),
            "replaced": total,
            "losses": report.losses,
        }
        export(engine, config, job.out, training)
        log.write(event="end", **training)
        report.close()
        engine.close()


def _parts(arrays: dict[str, Any], parts: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
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
