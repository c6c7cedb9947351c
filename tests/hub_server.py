"""A server that speaks the Hugging Face hub's protocol, on loopback, with faults on demand."""

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?$")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_LARGE = (".safetensors", ".gguf", ".model")  # kept by git-lfs: named by SHA-256


@dataclass
class Repo:
    """One repository: its files, and who may read them."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None  # needed to read it
    gated: bool = False  # to all but the token's owner

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()


@dataclass
class Faults:
    """What goes wrong. Paths are those of files."""

    status: dict[str, int] = field(default_factory=dict)  # path, or "api" -> status
    cut: Counter[str] = field(default_factory=Counter)  # path -> bodies to break off in the middle
    damaged: set[str] = field(default_factory=set)  # paths whose first byte is another
    short: set[str] = field(default_factory=set)  # paths of which the end is not announced


class HubServer:
    """Serves `repos`, by their names; `requests` has (method, path, range) of each request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The files whose bodies were asked for."""
        paths = (_FILE.match(path) for method, path, _ in self.requests if method == "GET")
        return [unquote(match[3]) for match in paths if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_of
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        api, file = _API.match(self.path), _FILE.match(self.path)
        match = api or file
        repo = hub.repos.get(match[1]) if match else None
        path = unquote(file[3]) if file else "api"
        if path in hub.faults.status:
            return self._error(hub.faults.status[path], None)
        refused = repo is None or (repo.token and not self._is_allowed(repo.token))
        if refused or repo is None or match is None:
            gated = repo is not None and repo.gated
            status = (403 if self.headers.get("Authorization") else 401) if gated else 401
            return self._error(status, "GatedRepo" if gated else "RepoNotFound")
        revision = (api[3] if api else match[2]) or "main"
        if unquote(revision) not in (*repo.revisions, repo.sha):
            return self._error(404, "RevisionNotFound")
        if api:
            return self._api(repo, match[1], tree=api[2] == "tree")
        if path not in repo.files:
            return self._error(404, "EntryNotFound")
        return self._file(repo, path)

    def _is_allowed(self, token: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {token}"

    def _error(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"the hub says {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _api(self, repo: Repo, name: str, *, tree: bool) -> None:
        body: object = {
            "_id": "1",
            "id": name,
            "sha": repo.sha,
            "siblings": [{"rfilename": path} for path in repo.files],
        }
        if tree:
            body = [
                {"type": "file", "path": path, "size": len(data), "oid": _git_digest(data)}
                | (_lfs(data) if path.endswith(_LARGE) else {})
                for path, data in repo.files.items()
            ]
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, repo: Repo, path: str) -> None:
        faults, data = self.server_of.faults, repo.files[path]
        large = path.endswith(_LARGE)
        etag = hashlib.sha256(data).hexdigest() if large else _git_digest(data)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        body = data[start:]
        if path in faults.damaged:
            body = bytes([body[0] ^ 1]) + body[1:]
        if path in faults.short:
            body = body[:-1]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repo.sha)
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if faults.cut[path] > 0:
            faults.cut[path] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}
