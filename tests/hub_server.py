"""A stand-in for the Hugging Face Hub: as much of its API as reading a dataset's files takes, in a thread."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """Dataset repositories by (name, revision), each a mapping of paths to contents.

    Attributes:
        gated: repositories whose files are refused.
        cut: answer so many more requests for a file with half of what they ask for.
        sent: bytes of files that were sent.
        requests: those for anything but files.
    """

    repositories: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: int = 0
    sent: int = 0
    requests: int = 0
    endpoint: str = ""


class _Refused(Exception):
    """Arguments: status, the Hub's error code."""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub whose server ends with this block."""
    hub = Hub()

    class Handler(_Handler):
        of = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    of: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        self._answer(json.loads(body) if is_json else parse_qs(body))

    def _answer(self, form: dict[str, Any]) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        try:
            if path.startswith("/api/"):
                self.of.requests += 1
                content = json.dumps(self._api(path.split("/"), query, form)).encode()
                self._send(200, content, {"Content-Type": "application/json"})
            else:
                _, _, owner, name, _, revision, *names = path.split("/")
                self._send_file(self._files(f"{owner}/{name}", revision, True)[unquote("/".join(names))])
        except _Refused as refused:
            self._send(refused.args[0], b"", {"X-Error-Code": refused.args[1]})
        except KeyError:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _files(self, repository: str, revision: str, content: bool = False) -> dict[str, bytes]:
        if not any(name == repository for name, _ in self.of.repositories):
            raise _Refused(401, "RepoNotFound")
        if content and repository in self.of.gated:
            raise _Refused(403, "GatedRepo")
        if (repository, unquote(revision)) not in self.of.repositories:
            raise _Refused(404, "RevisionNotFound")
        return self.of.repositories[repository, unquote(revision)]

    def _api(self, parts: list[str], query: dict[str, Any], form: dict[str, Any]) -> Any:
        if parts[2:3] != ["datasets"]:  # it asks for more than files
            raise KeyError(parts)
        owner, name, *rest = parts[3:]
        what, revision, *names = rest or ["revision", "main"]
        files = self._files(f"{owner}/{name}", revision)
        if what == "revision":
            return {"id": f"{owner}/{name}", "sha": "0" * 40, "private": False, "siblings": []}
        if what == "paths-info":
            paths = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
            entries = _entries(files)
            return [entries[path] for path in paths if path in entries]
        folder, recursive = unquote("/".join(names)), query["recursive"][0].lower() == "true"
        below = {path: entry for path, entry in _entries(files).items() if not folder or path.startswith(f"{folder}/")}
        if not below:
            raise KeyError(folder)
        depth = folder.count("/") + 1 if folder else 0
        return [entry for path, entry in below.items() if recursive or path.count("/") == depth]

    def _send_file(self, content: bytes) -> None:
        size, status, headers = len(content), 200, {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last or size) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{size}"
        cut = self.of.cut > 0
        self.of.cut -= int(cut)
        self._send(status, content, headers, len(content) // 2 if cut else None)
        self.of.sent += len(content)

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut_after])
        self.close_connection = self.close_connection or cut_after is not None


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """The tree of a repository, folders first, as the Hub describes it."""
    folders = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    entries = {path: {"type": "directory", "path": path, "oid": _oid(path.encode()), "size": 0} for path in folders}
    for path, content in files.items():
        entries[path] = {"type": "file", "path": path, "oid": _oid(content), "size": len(content)}
    return dict(sorted(entries.items()))
