"""A local hub: a folder served to the requests that huggingface_hub makes for data sets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves `root/OWNER/NAME/…` as the data set OWNER/NAME, whose branch `main` is at `commit`.

    Attributes:
        failures: how often a request (method and path) will still be answered with `status`.
        asked: how often each request was made.
    """

    daemon_threads = True

    def __init__(self, root: Path, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.commit = root, commit
        self.failures: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.status = 503

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.asked[request] += 1
        if self.server.failures[request] > 0:
            self.server.failures[request] -= 1
            self.send(self.server.status, b"busy")
            return
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        _, owner, name, verb, revision, *inner = parts[api:]
        folder = self.server.root / owner / name
        if not folder.is_dir():
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.server.commit):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            self.send(200, json.dumps({"id": f"{owner}/{name}", "sha": self.server.commit}).encode())
        elif verb == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            tree = [
                {
                    "type": "file",
                    "path": str(file.relative_to(folder)),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self.send(200, json.dumps(tree).encode())
        elif not (folder / "/".join(inner)).is_file():
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit})
        else:
            data = (folder / "/".join(inner)).read_bytes()
            marks = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self.send(200, data, marks)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path, commit: str = "c" * 40) -> Iterator[Hub]:
    hub = Hub(root, commit)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
