"""A program as a process: its command, its start, its health, its end. Knows one at a time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from command.machine import address
from policies.children import dying_with

Health = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Program:
    """A command that serves HTTP, and where GET /health answers 200 once it is ready."""

    name: str
    argv: tuple[str, ...]
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    drain_s: float = 5.0  # what it has after SIGTERM to finish its requests
    grace_s: float = 0.0  # and then to end, before SIGKILL
    refusal: int | None = None  # the exit code that says: starting again would not help
    key: str | None = field(default=None, repr=False)  # that its health is asked for with
    probe: tuple[str, ...] | None = None  # instead: a command that ends with 0 while it is well
    probe_every_s: float = 0.1  # until it is
    waits_for: tuple[str, ...] = ()  # programs that must be ready before it is started
    rests_on: tuple[str, ...] = ()  # programs that end only after it
    stop: signal.Signals = signal.SIGTERM
    fact: str | None = None  # what its health always tells, so that no stranger passes for it

    @property
    def url(self) -> str:
        return f"http://{address(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class Life:
    """A started program and its words, stdout and stderr together."""

    process: asyncio.subprocess.Process
    words: asyncio.StreamReader
    pipe: asyncio.ReadTransport


async def spawn(program: Program) -> Life:
    """Starts the program so that it dies with this process. Raises OSError.

    The pipe is our own: asyncio's would keep `process.wait()` waiting for as long as anything that
    the program started holds it open.
    """
    ours, theirs = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *program.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | program.environment,
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    words = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(words), os.fdopen(ours, "rb")
    )
    return Life(process, words, pipe)


async def ask(program: Program) -> tuple[bool, Health]:
    """Whether a program is well, and what it says of itself."""
    if program.probe is not None:
        return await _probe(program.probe, program.environment), {}
    status, health = await ask_health(program.host, program.port, program.key)
    return status == 200 and (program.fact is None or program.fact in health), health


async def _probe(argv: tuple[str, ...], environment: Mapping[str, str]) -> bool:
    silent = asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=silent, stdout=silent, stderr=silent, env=os.environ | environment
        )
    except OSError:
        return False
    try:
        return await process.wait() == 0
    finally:
        if process.returncode is None:  # who asked has been cancelled
            process.kill()


async def ask_health(
    host: str, port: int, key: str | None = None, timeout_s: float = 2.0
) -> tuple[int, Health]:
    """Status and JSON object of GET /health; (0, {}) where nothing answers in time."""
    bearer = "" if key is None else f"Authorization: Bearer {key}\r\n"
    request = (
        f"GET /health HTTP/1.0\r\nHost: {address(host, port)}\r\n{bearer}Connection: close\r\n\r\n"
    )
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request.encode())
            answer = await reader.read(2**20)
            while chunk := await reader.read(2**20):
                answer += chunk
    except (OSError, TimeoutError):
        return 0, {}
    finally:
        if writer is not None:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not status or not status[0].isdigit():
        return 0, {}
    try:
        health = json.loads(body)
    except ValueError:
        health = None
    return int(status[0]), health if isinstance(health, dict) else {}


def complaints(health: Health) -> list[str]:
    """What a gateway's health says of the replicas that take no requests: `URL: why`."""
    replicas = health.get("replicas")
    return [
        f"{replica.get('url')}: {replica['error']}"
        for replica in (replicas if isinstance(replicas, list) else [])
        if isinstance(replica, dict) and not replica.get("healthy") and replica.get("error")
    ]


def describe_exit(code: int) -> str:
    """`ended with exit code 1`, `was killed by SIGKILL (out of memory?)`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
