"""Shared by all tests: one Ray session, one indexed pool, one tiny CLIP."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from tests.drawing import write_pool
from winnow.infra.pool.index import IndexStage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which xdist's processes ignore


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with tests on Ray first: they take longest, and with `-n` a process runs whole files."""
    on_ray = {item.location[0] for item in items if "ray_session" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.location[0] not in on_ray)


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray of two cores, started once. Tests take an executor from `ray_executor`."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def ray_executor(ray_session):
    from winnow.infra.stages.executors import RayExecutor

    return RayExecutor()


@pytest.fixture(scope="session")
def small_pool(tmp_path_factory) -> str:
    """An indexed pool of 3 shards with 8 samples each; URL of the pool directory."""
    folder = tmp_path_factory.mktemp("small-pool")
    write_pool(folder / "shards", shards=3, per_shard=8)
    execute(IndexStage((str(folder / "shards"),), str(folder / "pool")), SerialExecutor())
    return str(folder / "pool")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real pool and evaluation sets; WINNOW_DATA or ../shared/data."""
    folder = Path(os.environ.get("WINNOW_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "pool").is_dir():
        pytest.skip("the real data is not here (set WINNOW_DATA)")
    return folder
