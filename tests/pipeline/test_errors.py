"""What goes wrong outside of Winnow is one readable paragraph, with the exit status that fits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.drawing import write_pool
from tests.field.helpers import winnow
from winnow.infra.io import retry

SERIAL = ("--executor", "serial")


def told(printed: str) -> str:
    """What was printed, which is one paragraph of a few sentences and no name of an exception at its start."""
    line = printed.strip().splitlines()[-1]
    assert "\n\n" not in printed and "Traceback" not in printed and "--debug" not in printed
    assert line.startswith("winnow: ") and line.endswith((".", "!", "?")), printed
    return line


def test_an_unknown_protocol(tmp_path: Path) -> None:
    shards = write_pool(tmp_path / "shards", 1, 2)
    for args in (("foo://bucket/x", "--out", tmp_path / "pool"), (shards, "--out", "foo://bucket/x")):
        status, printed = winnow("index", *args, *SERIAL)
        assert status == 2 and "foo://bucket/x: cannot be opened (Protocol not known: foo)" in told(printed)


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(retry, "WAIT", 0.001)
    status, printed = winnow("index", "https://127.0.0.1:9/pool", "--out", tmp_path / "pool", *SERIAL)
    assert status == 1 and "https://127.0.0.1:9/pool" in told(printed) and "Cannot connect" in printed


def test_a_storage_that_refuses_access(tmp_path: Path, monkeypatch) -> None:
    from moto import settings
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(endpoint_url=url)
        store.mkdir("closed")
        write_pool(tmp_path / "shards", 1, 2)
        store.put(str(tmp_path / "shards"), "closed/shards", recursive=True)
        assert winnow("index", "s3://closed/shards", "--out", tmp_path / "pool", *SERIAL)[0] == 0
        monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # now it asks who wants to know
        s3fs.S3FileSystem.clear_instance_cache()
        for args in (("s3://closed/shards", "--out", tmp_path / "b"), (tmp_path / "shards", "--out", "s3://closed/b")):
            status, printed = winnow("index", *args, *SERIAL)
            assert status == 1 and "the storage refuses access" in told(printed) and "s3://closed/" in printed
        status, printed = winnow(
            "measure", tmp_path / "pool", "--out", tmp_path / "m", "--measures", "quality", *SERIAL
        )
        assert status == 1 and "the storage refuses access" in told(printed), printed
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_ray_that_does_not_start(tmp_path: Path) -> None:
    """In a process of its own, because other tests may have started one."""
    write_pool(tmp_path / "shards", 1, 2)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "winnow.pipeline.cli", "index", tmp_path / "shards", "--out", tmp_path / "pool"]
    done = subprocess.run(command, env=environment | {"RAY_TMPDIR": "/proc/nothing"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "local Ray: Ray did not start" in told(done.stderr) and "RAY_TMPDIR" in done.stderr


@pytest.fixture
def closed():
    """A directory that this process may read and not write."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(before)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("inner", ["", "new"])
def test_an_output_that_cannot_be_written(closed: Path, inner: str) -> None:
    from winnow.infra.errors import UsageError
    from winnow.infra.io import storage

    status, printed = winnow("index", "memory://nothing", "--out", closed / inner, *SERIAL)
    assert status == 2 and "Permission denied" in told(printed) and str(closed) in printed
    for path in (closed / inner / "a.json", closed / "a" / "b.json"):
        with pytest.raises(UsageError, match=r"cannot be (written|created)"):
            storage.write_json(str(path), {})


@pytest.mark.parametrize("out", ["/proc/winnow", "/dev/null/pool"])
def test_an_output_where_no_directory_can_be(tmp_path: Path, out: str) -> None:
    status, printed = winnow("index", write_pool(tmp_path / "shards", 1, 2), "--out", out, *SERIAL)
    assert status == 2 and f"{out}: cannot be created as a directory" in told(printed)
