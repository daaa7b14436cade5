"""Trainings in processes of their own that are killed, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

from winnow.pretrain.launch import PRELOADED

CONTEXT = multiprocessing.get_context("forkserver")
_NETWORKS = ["diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d"]


def start(job: Any, rendezvous: Path, die_at: int, last_words: Path | None = None) -> list[Any]:
    """The processes of a training, of which the last kills itself with SIGKILL after `die_at` steps (0: never)."""
    CONTEXT.set_forkserver_preload([*PRELOADED, *_NETWORKS])
    config = job.config
    started = []
    for rank in range(config.parallel.num_processes):
        dies = die_at if rank == config.parallel.num_processes - 1 else 0
        process = CONTEXT.Process(target=_train, args=(rank, job, str(rendezvous), dies, last_words))
        process.start()
        started.append(process)
    return started


def run(job: Any, folder: Path, die_at: int = 0) -> list[int]:
    """Exit codes of the processes; once one is dead, the others are killed too, wherever they are."""
    processes = start(job, folder / f"meet-{uuid.uuid4()}", die_at)
    if die_at:
        processes[-1].join()
    for process in processes:
        if die_at and process is not processes[-1]:
            process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _train(rank: int, job: Any, rendezvous: str, die_at: int, last_words: Path | None) -> None:
    from winnow.pretrain.engine.engine import Engine
    from winnow.pretrain.launch import _local_process

    if last_words is not None:
        sys.stderr = open(f"{last_words}-{rank}", "w", encoding="utf-8")  # noqa: SIM115 (the process's own)
    step = Engine.step

    def mortal(self: Engine, parts: list, number: int, want_norm: bool) -> Any:
        result = step(self, parts, number, want_norm)
        if number + 1 == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Engine.step = mortal  # type: ignore[method-assign]
    _local_process(rank, [job], job.config, rendezvous, None)
