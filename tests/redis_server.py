"""A Redis of a test's own: started on a free port, killed, paused, flushed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from command.machine import free_ports

BINARY = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(BINARY is None, reason="no redis-server: apt-get install it")
START_S = 20.0


class RedisServer:
    """One process, without persistence, on a port that stays the same over its lives."""

    def __init__(self, folder: Path, *more: str, tls: bool = False) -> None:
        (self.port,) = free_ports(1)
        self._folder = folder
        self._more = more
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert BINARY is not None
        port = ["--port", "0", "--tls-port"] if self._tls else ["--port"]
        arguments = [*port, f"{self.port}", "--bind", "127.0.0.1", "--dir", f"{self._folder}"]
        self._process = subprocess.Popen(
            [BINARY, *arguments, "--save", "", "--appendonly", "no", *self._more],
            stdout=subprocess.DEVNULL,
        )
        ends_at = time.monotonic() + START_S
        while not self._listens() if self._tls else self._answers("PING") is None:
            assert time.monotonic() < ends_at, "redis-server does not answer"
            time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        assert self._answers("FLUSHALL") == b"+OK\r\n"

    def _listens(self) -> bool:
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", self.port)) == 0

    def _answers(self, command: str) -> bytes | None:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
                line.sendall(f"{command}\r\n".encode())
                return line.recv(4096)
        except OSError:
            return None


@contextmanager
def redis_server(*more: str, tls: bool = False) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), *more, tls=tls)
        server.start()
        try:
            yield server
        finally:
            server.kill()
