"""Runs Python that nobody has read: in a process of its own, which can read files and compute, and
nothing else.

Linux only. The process gives up, before it runs a line of it: sockets, new processes, writing,
renaming and deleting files, signals to others (a seccomp filter, which nobody can take back); and
has limits of time, memory and open files. It still reads what the user may read: what it finds it
has no way to tell anyone but by passing its tests or not.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SAID_CHARS_MAX = 2000
_JAIL = Path(__file__).with_name("jail.py")
_UNHELD = "cannot be held in: "  # as the jail says it
_STARTS_S = 5.0  # that the interpreter and the filter may take


class NoSandbox(Exception):
    """There is no way to hold code in on this machine."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run ended; `said` is the end of its error output."""

    passed: bool
    said: str


def try_sandbox() -> None:
    """Raises NoSandbox where code cannot be held in."""
    _refuse_elsewhere()
    secret = secrets.token_hex(16)
    command = _command(Limits(seconds=_STARTS_S, memory_bytes=2**29))
    try:
        ran = subprocess.run(
            command,
            check=False,
            input=f"{secret}\n".encode(),
            capture_output=True,
            env={},
            timeout=_STARTS_S * 4,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoSandbox(str(error)) from None
    if secret.encode() not in ran.stdout:
        said = ran.stderr.decode("utf-8", "replace")[-SAID_CHARS_MAX:]
        raise NoSandbox(said.removeprefix(_UNHELD).strip() or f"it ended with {ran.returncode}")


def _refuse_elsewhere() -> None:
    if sys.platform != "linux":
        raise NoSandbox(
            f"code is only run on Linux, where it can be held in, not on {sys.platform}"
        )


def _command(limits: Limits) -> list[str]:
    seconds = str(max(1, round(limits.seconds)))
    return [sys.executable, "-I", "-S", "-B", str(_JAIL), str(limits.memory_bytes), seconds]


async def run_python(source: str, limits: Limits) -> Ran:
    """Whether it runs to its end; not, where it cannot be held in. Raises NoSandbox elsewhere.

    The end is told by a secret that the process has only at its end: an early exit is no success.
    """
    _refuse_elsewhere()
    secret = secrets.token_hex(16)
    said = f"{secret}\n{source}".encode("utf-8", "replace")
    with tempfile.TemporaryDirectory(prefix="headgate-code-") as folder:
        process = await asyncio.create_subprocess_exec(
            *_command(limits), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(limits.seconds + _STARTS_S):
                told, errors = await process.communicate(said)
        except TimeoutError:
            return Ran(False, f"did not end within {limits.seconds:g} s")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    complaint = errors.decode("utf-8", "replace")[-SAID_CHARS_MAX:]
    return Ran(secret.encode() in told, complaint)
