"""Storage: errors that pass are waited for, names are literal, and what a killed process leaves is swept up."""

import http.server
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.drawing import write_pool
from tests.field.helpers import winnow
from winnow.infra.errors import StorageError, WinnowError
from winnow.infra.io import retry, storage


class Troubled:
    """A WSGI application that fails the next `left` downloads below `below` in the way `kind`."""

    def __init__(self, app):
        self.app, self.kind, self.left, self.below = app, "500", 0, "/shards/"

    def __call__(self, environ, start):
        if self.left <= 0 or environ["REQUEST_METHOD"] != "GET" or self.below not in environ["PATH_INFO"]:
            return self.app(environ, start)
        self.left -= 1
        if self.kind == "timeout":
            time.sleep(1.5)
        if self.kind == "reset":
            plug = environ["werkzeug.socket"]
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            plug.close()
            raise ConnectionResetError
        if self.kind == "cut":
            start("206 Partial Content", [("Content-Length", "100000"), ("ETag", '"x"')])
            return [b"x"]
        start(f"{self.kind if self.kind != 'timeout' else 503} Trouble", [])
        return [b""]


@pytest.fixture(scope="module")
def troubled():
    """moto's S3 behind trouble; neither botocore nor s3fs waits for an error to pass."""
    import s3fs
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    trouble = Troubled(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, trouble, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        options = {"key": "x", "secret": "x", "endpoint_url": f"http://127.0.0.1:{server.port}"}
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, "read_timeout": 0.5}
        patch.setitem(fsspec.config.conf, "s3", options)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        patch.setattr(retry, "WAIT", 0.01)
        fsspec.filesystem("s3").mkdir("winnow")
        yield trouble
    server.shutdown()


@pytest.fixture(scope="module")
def shards(troubled, tmp_path_factory):
    """A pool of shards in the bucket, and what indexing the same on a disk gives."""
    folder = write_pool(tmp_path_factory.mktemp("pool") / "shards", 2, 3)
    fsspec.filesystem("s3").put(f"{folder}/", "winnow/shards/", recursive=True)
    assert winnow("index", folder, "--out", folder.parent / "pool", "--executor", "serial")[0] == 0
    return "s3://winnow/shards", json.loads((folder.parent / "pool" / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["500", "503", "timeout", "reset", "cut"])
def test_an_error_that_passes_changes_nothing(troubled, shards, tmp_path, kind):
    troubled.kind, troubled.left = kind, 3
    status, printed = winnow("index", shards[0], "--out", tmp_path / "pool", "--executor", "serial", "--max-skipped", 0)
    assert status == 0 and troubled.left == 0, printed
    found = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    assert found["values"] == shards[1]["values"] and found["skipped"]["count"] == 0
    troubled.left = 3
    status, printed = winnow("reshard", tmp_path / "pool", "--out", tmp_path / "again", "--executor", "serial")
    assert status == 0 and "6 samples" in printed and troubled.left == 0, printed


def test_an_error_that_stays_fails_the_run_whatever_may_be_skipped(troubled, shards, tmp_path):
    troubled.kind, troubled.left, troubled.below = "503", 1000, "/shards/00001.tar"
    args = ("index", shards[0], "--out", tmp_path / "pool", "--executor", "serial", "--max-skipped", 1000)
    status, printed = winnow(*args)
    troubled.left, troubled.below = 0, "/shards/"
    assert status == 1 and "00001.tar: the storage failed 6 times" in printed
    assert not (tmp_path / "pool" / "manifest.json").exists()
    assert winnow(*args)[0] == 0
    assert json.loads((tmp_path / "pool" / "manifest.json").read_text())["values"] == shards[1]["values"]


def test_what_will_not_pass_is_said_at_once(troubled, shards):
    start = time.monotonic()
    with pytest.raises(WinnowError, match="no such file"):
        storage.read_bytes("s3://winnow/nothing")
    assert not storage.exists("s3://winnow/nothing") and not storage.is_dir("s3://winnow/nothing")
    assert storage.is_dir(shards[0]) and storage.exists(f"{shards[0]}/00000.tar")
    assert time.monotonic() - start < 30


def test_ranges_are_data_or_an_error(troubled, shards):
    troubled.kind, troubled.left = "500", 1000
    with pytest.raises(StorageError):
        storage.read_ranges(f"{shards[0]}/00000.tar", [0, 100_000], [10, 10])
    troubled.left = 0


class Half(http.server.BaseHTTPRequestHandler):
    """A server without ranges that closes the connection in the middle of a shard."""

    content = b""

    def do_GET(self):
        self.send_response(200 if self.path.endswith(".tar") else 404)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2])

    do_HEAD = do_GET

    def log_message(self, *_):
        return


def test_a_stream_that_breaks_off_is_no_truncated_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(Half, "content", (write_pool(tmp_path / "shards", 1, 3) / "00000.tar").read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    args = ("--out", tmp_path / "pool", "--executor", "serial", "--max-skipped", 1000)
    status, printed = winnow("index", f"http://127.0.0.1:{server.server_port}/00000.tar", *args)
    server.shutdown()
    assert status == 1 and "00000.tar: the connection failed (curl's exit status 18)" in printed
    assert not (tmp_path / "pool" / "manifest.json").exists()


class Broken(io.BytesIO):
    def read(self, size=-1):
        raise StorageError("the storage failed")


def test_the_readers_of_other_libraries_pass_it_on():
    """None of them takes it for a damaged file, which would be skipped."""
    import tarfile
    import zipfile

    import pyarrow.parquet as pq

    from winnow.infra.io.tar import tar_samples

    readers = [pq.ParquetFile, zipfile.ZipFile, np.load, tarfile.open, lambda file: list(tar_samples(file, ()))]
    for read in readers:
        with pytest.raises(StorageError):
            read(fileobj=Broken(b"x" * 1000)) if read is tarfile.open else read(Broken(b"x" * 1000))


@pytest.mark.parametrize("name", ["run*", "run?", "run[1]", "{run1,run2}"])
def test_removing_takes_a_name_literally(tmp_path, name):
    fs, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    for folder in ("run1", "run2", name):
        fs.pipe_file(f"{root}/{folder}/manifest.json", b"1")
        fs.pipe_file(f"{root}/{folder}/units/0.json", b"1")
    storage.remove(f"memory:/{root}/{name}/manifest.json")
    assert not fs.exists(f"{root}/{name}/manifest.json") and fs.exists(f"{root}/{name}/units/0.json")
    storage.remove(f"memory:/{root}/{name}")
    storage.remove(f"memory:/{root}/{name}")
    assert not fs.exists(f"{root}/{name}")
    assert all(fs.exists(f"{root}/run{i}/{path}") for i in (1, 2) for path in ("manifest.json", "units/0.json"))


def test_removing_on_s3_takes_a_name_literally(troubled):
    fs = fsspec.filesystem("s3")
    for folder in ("runs/1", "runs/*"):
        fs.pipe_file(f"winnow/{folder}/a", b"1")
    storage.remove("s3://winnow/runs/*")
    assert fs.find("winnow/runs") == ["winnow/runs/1/a"]


def test_two_writers_with_one_process_id_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    url = str(tmp_path / "file")
    with storage.writing(url) as first, storage.writing(url) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "file").read_bytes() == b"first" and [path.name for path in tmp_path.iterdir()] == ["file"]
    long = str(tmp_path / ("ü" * 127))
    storage.write_bytes(long, b"x")
    assert Path(long).read_bytes() == b"x"


KILLED = """
import os, sys, signal
from winnow.infra.io import storage
from winnow.infra.stages.stage import Output
from tests.infra.test_stage import Square, go
class Killed(Square):
    def run(self, unit):
        with storage.writing(self.url("deep", "half.txt")) as path:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
go(Killed((1, 2), sys.argv[1]))
"""


def test_what_a_killed_run_was_writing_is_swept_by_the_next(tmp_path):
    from tests.infra.test_stage import Square, go

    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False).returncode == -9
    (left,) = (tmp_path / "deep").iterdir()
    assert left.name.endswith(".part")
    (tmp_path / "deep" / ".old.txt.123.part").write_bytes(b"of an earlier version")
    (tmp_path / "deep" / ".mine.part").write_bytes(b"somebody's")
    other = tmp_path / "inner"  # another stage's directory, whose lock this run does not hold
    other.mkdir()
    (other / "locations.json").write_text("{}")
    (other / ".a.txt.123.part").write_bytes(b"being written")
    go(Square((1, 2), str(tmp_path)))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".mine.part"]
    assert (other / ".a.txt.123.part").exists()
