"""Starts the processes of a training: by Ray Train under the Ray executor, else on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages import stopping
from winnow.infra.stages.executors import on_ray
from winnow.infra.stages.resources import RESOURCE_LIMIT
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.sections import ParallelConfig

if TYPE_CHECKING:
    import torch

    from winnow.pretrain.loop import Job


STOP = ".stop"  # in the first training's directory: a request to stop
_GRACE = 5.0  # seconds that the other processes have to end when one has failed
# What every training process imports.
PRELOADED = ("winnow.pretrain.loop", "deepspeed", "open_clip", "torch.utils.tensorboard")


def launch(jobs: list[Job], via: Literal["auto", "local", "ray"] = "auto") -> None:
    """Run trainings of one config to their ends, one after the other in the same processes.

    A KeyboardInterrupt, or a signal while one trains in this process, stops them: the one that is running saves a
    checkpoint.

    Args:
        jobs: the trainings; their URLs must be absolute.
        via: `ray` starts the processes by Ray Train, `local` on this machine: one in this process, several by
            `torch.multiprocessing`. `auto` takes Ray Train under the Ray executor.

    Raises:
        WinnowError: as a process raised it, or that processes died more often than allowed.
        KeyboardInterrupt: they were stopped.
    """
    config = jobs[0].config
    ray = via == "ray" or (via == "auto" and on_ray())
    if config.parallel.num_processes == 1 and not ray:
        if not _local_process(0, jobs, config, None, None):
            raise KeyboardInterrupt
        return
    url = storage.join(jobs[0].out, STOP)
    jobs = [replace(job, stop=url) for job in jobs]
    with stopping.requestable(url):
        (_by_ray if ray else _by_spawn)(jobs, config)


def _local_process(rank: int, jobs: list[Job], config: PretrainConfig, rendezvous: str | None, errors: Any) -> bool:
    """Returns whether the trainings are finished."""
    import torch.distributed as dist

    from winnow.pretrain.engine.zero import destroy_group, load_deepspeed
    from winnow.pretrain.loop import train

    device, world = _local_device(rank, config.parallel), config.parallel.num_processes
    with _environment(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)), TemporaryDirectory() as folder:
        rendezvous = rendezvous or str(Path(folder) / "rendezvous")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        try:
            return all(train(job, device, "local") for job in jobs)
        except WinnowError as error:
            if errors is not None:
                errors.put(error)
            raise
        finally:
            load_deepspeed(device)
            destroy_group()


def _local_device(rank: int, parallel: ParallelConfig, use: bool = True) -> torch.device:
    import torch

    found, wanted = torch.cuda.device_count(), parallel.num_processes
    if parallel.device == "cpu" or (parallel.device == "auto" and found < wanted):
        return torch.device("cpu")
    if found < wanted:
        raise UsageError(f"{wanted} processes want a GPU each, there are {found}", where="parallel.device")
    device = torch.device("cuda", rank)
    if use:
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _by_spawn(jobs: list[Job], config: PretrainConfig) -> None:
    import torch.multiprocessing as mp

    # A server that has imported everything forks the processes in an instant, those of the next training too. A process
    # that has touched CUDA must not be forked.
    method = "forkserver" if _local_device(0, config.parallel, use=False).type == "cpu" else "spawn"
    context = mp.get_context(method)
    if method == "forkserver":
        module = OBJECTIVES.path(config.objective_name).partition(":")[0]
        context.set_forkserver_preload([*PRELOADED, module])
    with TemporaryDirectory() as folder:
        errors = context.SimpleQueue()
        args = (dict(os.environ), os.getpid(), jobs, config, str(Path(folder) / "rendezvous"), errors)
        processes = mp.start_processes(
            _spawned, args, nprocs=config.parallel.num_processes, start_method=method, join=False
        )
        try:
            while not processes.join(grace_period=_GRACE):
                pass
        except KeyboardInterrupt:
            if not stopping.stop_running(lambda: not any(process.is_alive() for process in processes.processes)):
                for process in processes.processes:
                    process.kill()
            raise
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            if not errors.empty():
                raise errors.get() from None
            raise WinnowError(f"a training process died: {str(error).strip().splitlines()[-1]}") from error


def _spawned(rank: int, environment: dict[str, str], launcher: int, *args: Any) -> None:
    os.environ.clear()  # the server has that of the first training
    os.environ.update(environment)
    for number in stopping.SIGNALS:  # a terminal or a batch system sends them to all processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    _local_process(rank, *args)


def _end_with(launcher: int) -> None:
    """End this process when its launcher is gone. A killed launcher cannot end it, and it would overwrite the files of
    the training that is started next."""
    while True:
        try:
            os.kill(launcher, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.5)


def _by_ray(jobs: list[Job], config: PretrainConfig) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Several trainings may wait for cores at once.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(RESOURCE_LIMIT))
    gpus = ray.cluster_resources().get("GPU", 0)
    parallel = config.parallel
    use_gpu = parallel.device == "cuda" or (parallel.device == "auto" and gpus >= parallel.num_processes)
    scratch = storage.join(jobs[0].out, ".ray")
    trainer = TorchTrainer(
        _ray_process,
        train_loop_config={"jobs": jobs},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=parallel.num_processes, use_gpu=use_gpu, resources_per_worker={"CPU": parallel.threads}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=scratch,
            # By default Ray repeats a start that found no room for ever.
            failure_config=FailureConfig(
                max_failures=parallel.max_failures,
                controller_failure_limit=parallel.max_failures,  # type: ignore[call-arg]
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, WinnowError):
                raise cause from None
        raise WinnowError(f"training failed: {str(error).strip().splitlines()[-1]}", where=jobs[0].out) from error
    except ray.exceptions.RayActorError as error:
        _release(ray, error.actor_id)
        raise
    finally:
        storage.remove(scratch)


def _release(ray: Any, controller: str) -> None:
    """Give back the cores and GPUs of a controller that has died, or its replacement would wait for them.

    Ray keeps an actor's placement groups to the end of the job. Ray Train's own cleaner does not know those that are
    not ready yet, and without Ray's dashboard it does not learn that the controller is dead. Only Ray's private table
    says which actor made a group.
    """
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    kind: Any = vars(gcs_pb2)["PlacementGroupTableData"]
    with contextlib.suppress(Exception):  # the wait for resources has a limit all the same
        for content in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
            group = kind.FromString(content)
            if group.creator_actor_id.hex() == controller and group.state != kind.REMOVED:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _ray_process(values: dict[str, Any]) -> None:
    import ray.train.torch

    from winnow.pretrain.loop import train

    all(train(job, ray.train.torch.get_device(), "ray") for job in values["jobs"])
