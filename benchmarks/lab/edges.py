"""Gateways beside each other before one upstream: how each is started, and what it costs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.mock_upstream import MODEL
from benchmarks.lab.models import peers_home
from benchmarks.lab.report import MeasurementFailed
from benchmarks.lab.stack import cpu_s, resident_mb
from command.machine import free_ports
from policies.slo import key_hash

OURS = "headgate"
# Of the two that can, or must, ask for one.
_KEYS = {OURS: "hg-of-the-benchmark-alone", "litellm": "sk-of-the-benchmark-alone-7f3a9c01d2"}
_ENVIRONMENT = {"LITELLM_MASTER_KEY": _KEYS["litellm"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
_HOST = "127.0.0.1"
_READY_LIMIT_S = 120.0
_STOP_LIMIT_S = 15.0

# Every part that serves by default, a tenant's key and its three limits, and tiers.
_LIMITS = """gateway:
  tenants:
    bench:
      keys: ["{digest}"]
      requests_per_minute: 1000000000
      tokens_per_minute: 1000000000000
      tokens_per_day: 1000000000000000
"""
_LITELLM = """model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: {upstream}/v1
      api_key: none
"""


@dataclass(frozen=True, slots=True)
class Edge:
    """A gateway that runs."""

    name: str
    port: int
    key: str | None
    process: psutil.Process

    def cpu_s(self) -> float:
        """User and system time of the whole process tree so far."""
        return sum(map(cpu_s, _tree(self.process)))

    def rss_mb(self) -> float:
        """Resident pages of the tree, those that processes share counted in each."""
        return sum(map(resident_mb, _tree(self.process)))


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


Command = Callable[[Sequence[str], int, Path], Sequence[str]]  # upstreams, port, folder to write in


def ours(settings: str = "", module: str = "gateway") -> Command:
    """With these settings behind its upstreams."""

    def command(upstreams: Sequence[str], port: int, folder: Path) -> Sequence[str]:
        policy = folder / "policy.yaml"
        urls = "".join(f"  - url: {one}\n" for one in upstreams)
        policy.write_text(f"version: 1\nupstreams:\n{urls}{settings}", encoding="utf-8")
        return (sys.executable, "-m", module, str(policy), "--port", str(port))

    return command


def router(package: str, module: str, log_level: str, *options: str) -> Command:
    def command(upstreams: Sequence[str], port: int, _folder: Path) -> Sequence[str]:
        return (
            str(peers_home() / f"{package}/bin/python"), "-m", module, "--worker-urls", *upstreams,
            "--host", _HOST, "--port", str(port),
            "--prometheus-port", str(free_ports(1, _HOST)[0]), "--log-level", log_level, *options,
        )  # fmt: skip

    return command


def _litellm(upstreams: Sequence[str], port: int, folder: Path) -> Sequence[str]:
    config = folder / "litellm.yaml"
    config.write_text(_LITELLM.format(upstream=upstreams[0], model=MODEL), encoding="utf-8")
    return (
        str(peers_home() / "litellm/bin/litellm"), "--config", str(config),
        "--host", _HOST, "--port", str(port), "--telemetry", "False",
    )  # fmt: skip


_AWARE = ("--policy", "cache_aware")
COMMANDS: dict[str, Command] = {
    OURS: ours(_LIMITS.format(digest=key_hash(_KEYS[OURS]))),
    "smg": router("smg", "smg.launch_router", "warn", *_AWARE),
    "vllm-router": router("vllm-router", "vllm_router.launch_router", "warning", *_AWARE),
    "sglang-router": router("sglang-router", "sglang_router.launch_router", "warn", *_AWARE),
    "litellm": _litellm,
}


def installed(name: str) -> bool:
    return name == OURS or (peers_home() / name / "bin").is_dir()


@contextlib.contextmanager
def listening(module: str, *arguments: str) -> Iterator[Any]:
    """The port, or the ports, of a server of the lab that ends when nobody writes to it."""
    command = [sys.executable, "-m", f"benchmarks.lab.{module}", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


@contextlib.contextmanager
def running(name: str, *upstream_ports: int, command: Command | None = None) -> Iterator[Edge]:
    """One gateway, ready; ended with all its processes in the end."""
    command = command or COMMANDS[name]
    (port,) = free_ports(1, _HOST)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        upstreams = [f"http://{_HOST}:{one}" for one in upstream_ports]
        process = subprocess.Popen(
            command(upstreams, port, Path(folder)),
            cwd=ROOT if name == OURS else folder,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await_ready(name, port, process, log)
            yield Edge(name, port, _KEYS.get(name), psutil.Process(process.pid))
        finally:
            _end(process)


def _await_ready(name: str, port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + _READY_LIMIT_S
    url = f"http://{_HOST}:{port}/{'health/liveliness' if name == 'litellm' else 'health'}"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    raise MeasurementFailed(f"{name} was not ready: {log.read().decode('utf-8', 'replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children, which are in a session of their own."""
    try:
        tree = _tree(psutil.Process(process.pid))
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(tree, _STOP_LIMIT_S)
    for one in alive:
        one.kill()
    process.wait()
