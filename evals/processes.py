"""A program that serves HTTP, as a child that dies with us: started, told when ready, ended.

Knows processes and their words; what they serve, `arms.py` knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from policies.children import dying_with, package_environment

STOP_S = 30.0
LAST_WORDS = 12  # lines of a program that ended


class NotServing(Exception):
    """A program that ended before it was ready, with its last words."""


@contextlib.asynccontextmanager
async def serving(
    argv: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    is_ready: Callable[[str], bool],
    timeout_s: float,
    hear: Callable[[str], None] = lambda _line: None,
) -> AsyncIterator[list[str]]:
    """Runs it until the context is left; the lines up to the one that says that it is ready, each
    of which `hear` is told as it comes. All that it prints goes to `log`. Raises NotServing.
    """
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **package_environment(), **environment},
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),
        )
        said: list[str] = []
        ready = asyncio.Event()
        listening = asyncio.create_task(
            _listen(process, file.fileno(), said, is_ready, ready, hear)
        )
        try:
            await _until_ready(ready, listening, said, timeout_s)
            yield said
        finally:
            await _end(process)
            await listening


async def _listen(
    process: asyncio.subprocess.Process,
    log: int,
    said: list[str],
    is_ready: Callable[[str], bool],
    ready: asyncio.Event,
    hear: Callable[[str], None],
) -> None:
    assert process.stdout is not None
    async for raw in process.stdout:
        os.write(log, raw)
        if not ready.is_set():
            said.append(line := raw.decode("utf-8", "replace").rstrip())
            hear(line)
            if is_ready(line):
                ready.set()


async def _until_ready(
    ready: asyncio.Event, listening: asyncio.Task[None], said: list[str], timeout_s: float
) -> None:
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait(
            (waiting, listening), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        waiting.cancel()
    if not ready.is_set():
        words = "\n".join(deque(said, maxlen=LAST_WORDS))
        why = "ended before it served" if listening.done() else f"did not serve in {timeout_s:g} s"
        raise NotServing(f"{why}; its last words:\n{words}" if words else why)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
