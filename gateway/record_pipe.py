"""The process that writes what is recorded, and the pipe to it, which never holds anybody up.

What the pipe does not take waits, up to a bound; beyond it, or without a writer, frames are lost
and counted. Knows bytes; knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("headgate.gateway")

PIPE_BYTES = 2**20  # as much as anybody may ask of the kernel: the writer is woken seldom
WAITING_MAX_BYTES = 8 * 2**20  # in front of the pipe
AGAIN_S = 10.0  # until a writer that died is started again
END_S = 10.0  # for the writer to finish its file
ROOT = Path(__file__).resolve().parent.parent


class Pipe:
    """To one writing process at a time. `lost` is told how many records a lost frame had."""

    def __init__(self, module: str, argument: str, lost: Callable[[int], None]) -> None:
        self._command = (sys.executable, "-m", module, argument)
        self._lost = lost
        self._process: asyncio.subprocess.Process | None = None
        self._descriptor = -1
        self._waiting: list[tuple[memoryview, int]] = []
        self._waiting_bytes = 0
        self._started = 0.0
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._started = time.monotonic()
        reads, writes = os.pipe()
        try:
            with suppress(OSError, AttributeError):  # not as large, or not on this system
                fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            os.set_blocking(writes, False)
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=reads, cwd=ROOT
            )
        except BaseException:
            os.close(writes)
            raise
        finally:
            os.close(reads)
        self._descriptor = writes

    @property
    def takes(self) -> bool:
        """Whether anything can be sent; a writer that has died is started again in a while."""
        if self._process is None or self._process.returncode is not None:
            self._close()
            self._start_again()
            return False
        return self._waiting_bytes <= WAITING_MAX_BYTES

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def send(self, frame: bytes, records: int) -> None:
        """As much as the pipe takes; the rest goes with the next one."""
        self._waiting.append((memoryview(frame), records))
        self._waiting_bytes += len(frame)
        self.push()

    def push(self) -> None:
        """What waits, as far as the pipe takes it."""
        while self._waiting and self._descriptor >= 0:
            view, records = self._waiting[0]
            try:
                count = os.write(self._descriptor, view)
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._close()
                return
            self._waiting_bytes -= count
            if count < len(view):
                self._waiting[0] = (view[count:], records)
                return
            del self._waiting[0]

    async def end(self) -> None:
        """Gives the writer what is left and the time to finish; kills one that does not."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        process = self._process
        if process is None:
            return
        try:
            async with asyncio.timeout(END_S):
                while self._waiting and self._descriptor >= 0 and process.returncode is None:
                    await self._writable()
                    self.push()
                self._close()
                await process.wait()
        except TimeoutError:
            log.warning("the recorder did not end in %g s and was killed", END_S)
            process.kill()
            self._close()
            await process.wait()

    async def _writable(self) -> None:
        """Until the pipe takes something, or nobody reads it any more."""
        loop, come = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._descriptor, come.set)
        try:
            await come.wait()
        finally:
            loop.remove_writer(self._descriptor)

    def _close(self) -> None:
        """What still waits is lost."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lost(sum(records for _, records in self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _start_again(self) -> None:
        """Not at once: what kills it may well kill the next one."""
        if time.monotonic() - self._started < AGAIN_S or (
            self._starting is not None and not self._starting.done()
        ):
            return
        log.warning("the recorder has ended and is started again")
        self._starting = asyncio.create_task(self.start())
