"""The one loop: every process of every training runs `train`. It knows no objective by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.stages import stopping
from winnow.pretrain.checkpoint.due import Due
from winnow.pretrain.checkpoint.export import export
from winnow.pretrain.checkpoint.load import initial_weights
from winnow.pretrain.checkpoint.resume import Resume, Saved, disk_is_full
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.data.loader import Batches
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.distributed import rank, world_size
from winnow.pretrain.engine.engine import Engine
from winnow.pretrain.models.batchnorm import over_whole_batch
from winnow.pretrain.monitor.flops import model_flops, peak_flops
from winnow.pretrain.monitor.metrics import Report
from winnow.pretrain.monitor.writers import LOG, Boards, StepLog
from winnow.pretrain.objectives.base import Objective


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        config: how, checked.
        pool, subset: URLs of an indexed pool and of a subset's .npy (None: the whole pool).
        out: URL of the training's directory.
        seed: of initialisation, order and augmentation.
        key: of the training's content; it resumes only from checkpoints of the same.
        note: URL of a progress note, or "".
        measured: URL of the pool's measured columns, or None.
        stop: URL at which a request to stop may appear; "" where this process gets the signals itself.
    """

    config: PretrainConfig
    pool: str
    subset: str | None
    out: str
    seed: int
    key: str = ""
    note: str = ""
    measured: str | None = None
    stop: str = ""


def make_objective(config: PretrainConfig, seed: int) -> Objective:
    """The objective with its networks initialised from the seed, or from `config.init`, in training mode.

    torch's global generator is left as it was.
    """
    cls = config.objective_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective: Objective = cls(config.params, config.model.resolved(), config.augment)
    if cls.sync_batchnorm:
        over_whole_batch(objective)
    if config.init is not None:
        objective.initialise(initial_weights(config.init, objective.encoder()))
    return objective.train()


def train(job: Job, device: torch.device, via: str) -> bool:
    """Train to the end and export, or to a request to stop and a checkpoint. Returns whether it is finished.

    The process group must be up, and all its processes call this with the same job.

    On the CPU in float32, with the same number of processes and threads, an interrupted and resumed training ends in
    the same bits as an uninterrupted one.
    `via` says who started the processes, for the log.
    """
    try:
        with _settings(job.config.parallel.threads, device):
            return _train(job, job.config, device, via)
    except Exception as error:
        if not disk_is_full(error):
            raise
        do = "Free some and run again: it resumes from there."
        raise WinnowError("no space left on the disk", where=job.out, do=do) from error


def _train(job: Job, config: PretrainConfig, device: torch.device, via: str) -> bool:
    objective = make_objective(config, job.seed)
    with Resume(job.out, job.key, config.objective_name, config.checkpoint.keep) as resume:
        start, passed_over = resume.load(objective)
        engine = Engine(objective, config, device)
        if start is not None:
            engine.restore(start.tensors, start.scaler)
            start = Saved(start.step, {}, {}, start.state)  # frees the tensors
        first = start.step if start is not None else 0
        samples = Samples(job.pool, job.subset, config.sources, objective.columns, job.measured)
        samples.check(config.reads_text, config.batch_size if objective.couples_batch else 0)
        log = StepLog(storage.join(job.out, LOG), first, rank() == 0)
        log.write(event="start", step=first, samples=len(samples), workers=world_size(), via=via, device=device.type)
        for what in passed_over:
            log.write(event="checkpoint passed over", what=what)
        boards = Boards(config, job.out, job.key, first, rank() == 0)
        batches = Batches(
            samples, objective.views, seed=job.seed, batch=config.batch_size, rank=rank(), world=world_size(),
            first=first, last=config.steps, num_workers=config.parallel.num_workers, pin=device.type == "cuda",
        )  # fmt: skip
        with _stops(job) as stop, batches, contextlib.closing(boards):
            report = Report(config, log, boards, job.note if rank() == 0 else "", first, peak_flops(device))
            if start is not None:
                report.take(start.state)
            due = Due(config, first, stop)
            for step, arrays in enumerate(batches, start=first):
                parts = _parts(arrays, config.parallel.parts, device)
                if step == first and report.peak is not None:
                    copy = make_objective(config, job.seed).to(device)
                    report.flops = model_flops(copy, {name: value[:2] for name, value in parts[0].items()})
                # Dropout and the like draw from (seed, step, process), so there is no generator state to save.
                torch.manual_seed(((job.seed * 1_000_003 + step) * 65_537 + rank()) % (1 << 63))
                wanted = report.wants(step + 1)
                losses, facts = engine.step(parts, step, wanted)
                if wanted:
                    report.step(step + 1, losses, facts, engine, batches)
                resume.check()
                if what := due.after(step + 1):
                    resume.save(engine, step + 1, report.state(batches))
                if what == "stop":
                    resume.wait()
                    log.write(event="stopped", step=step + 1)
                    report.close()
                    return False
            total = report.state(batches)
        if first != config.steps:
            resume.save(engine, config.steps, total)
        seen = config.steps * config.batch_size
        training = {"seed": job.seed, "steps": config.steps, "samples_seen": seen, "samples": len(samples), **total}
        with engine.averaged():
            export(engine, config, job.out, training)
        resume.wait()
        log.write(event="end", **training)
        report.close()
        engine.close()
    return True


def _stops(job: Job) -> AbstractContextManager[Callable[[], bool]]:
    """Whether this process has been asked to stop; the first process alone asks."""
    if rank() != 0:
        return contextlib.nullcontext(lambda: False)
    return stopping.requested(job.stop) if job.stop else stopping.noticed()


def _parts(arrays: dict[str, Any], parts: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    split = {name: tensor.chunk(parts) for name, tensor in tensors.items()}
    return [{name: chunks[i] for name, chunks in split.items()} for i in range(parts)]


@contextlib.contextmanager
def _settings(threads: int, device: torch.device) -> Iterator[None]:
    """The process's threads and determinism, restored afterwards for callers that train in their own process."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    generator = torch.random.get_rng_state()
    torch.set_num_threads(threads)
    if device.type == "cpu":  # costs nothing there
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = filled
        torch.random.set_rng_state(generator)
