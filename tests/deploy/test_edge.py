"""The proxy's own file: what of a machine it does without."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command.machine import free_ports

ROOT = Path(__file__).parents[2]
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
# Runs what it is given, with fewer open files.
FEW = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
os.execv(sys.argv[1], sys.argv[1:])
"""
LIMIT_S = 60.0  # against hanging


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(HAPROXY is None, reason="not installed here: haproxy")
def test_it_starts_where_few_open_files_are_allowed(tmp_path: Path) -> None:
    """8,192 connections are 16,403 files: under a lower limit it ended as it began, and was started
    again and again. It says what is too low, and serves."""
    (port,) = free_ports(1)
    file = tmp_path / "haproxy.cfg"
    told = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    file.write_text(told.replace("bind :8080", f"bind 127.0.0.1:{port}"))
    log = tmp_path / "log"
    with log.open("w") as words:
        proxy = subprocess.Popen(
            [sys.executable, "-c", FEW, str(HAPROXY), "-db", "-f", str(file)],
            stdout=words, stderr=words,
        )  # fmt: skip
    try:
        ends_at = time.monotonic() + LIMIT_S
        while not answers(port):
            assert proxy.poll() is None, log.read_text()
            assert time.monotonic() < ends_at, log.read_text()
            time.sleep(0.05)
    finally:
        proxy.kill()
        proxy.wait()
    assert "limit is 512" in log.read_text()
