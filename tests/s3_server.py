"""A real S3 server (moto's, in a process of its own), and a bad network in front of it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest

from tests.conftest import require

BUCKET = "models"
_SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that ends with this block."""
    missing = [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]
    require("s3", not missing, f"no {', '.join(missing)}; pip install -e '.[s3]' 'moto[s3]'")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def settings(port: int) -> dict[str, str]:
    """The environment that leads S3's tools to a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


_client_of: list[int] = []  # the port that the client was made for: making one takes half a second


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let this test's processes ask the server at a port."""
    for name, value in settings(port).items():
        monkeypatch.setenv(name, value)
    if _client_of != [port]:
        forget_client()
        _client_of.append(port)


def forget_client() -> None:
    """After a change of the environment: the next use makes a new client."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    _client_of.clear()


def make_bucket(name: str = BUCKET) -> None:
    fsspec.filesystem("s3").mkdir(name)


def put(place: str, content: bytes) -> None:
    fsspec.filesystem("s3").pipe_file(place, content)


@dataclass
class BadNetwork:
    """A port that leads to another one, as long as it is up.

    Attributes:
        cut_after: close a connection after so many bytes from the server; each cut takes one from `cuts`.
        bytes_per_second: of each connection, in both directions.
    """

    target: int
    is_up: bool = True
    cut_after: int | None = None
    cuts: int = 0
    bytes_per_second: float | None = None
    cut: int = field(default=0, init=False)  # connections that were cut
    _listener: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.is_up:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, counted in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, sink, counted), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        passed = 0
        try:
            while self.is_up and (piece := source.recv(1 << 14)):
                passed += len(piece)
                if counted and self.cut_after is not None and self.cuts > 0 and passed > self.cut_after:
                    self.cuts -= 1
                    self.cut += 1
                    break
                if self.bytes_per_second:
                    time.sleep(len(piece) / self.bytes_per_second)
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


@contextmanager
def bad_network(target: int) -> Iterator[BadNetwork]:
    network = BadNetwork(target)
    try:
        yield network
    finally:
        network.close()


def files_holding(folder: Path, text: str) -> list[Path]:
    """The files below a folder that have a text in them."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
