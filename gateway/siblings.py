"""The other gateway processes of one `headgate serve`, asked for what each of them alone keeps.

Each listens in one folder of the file system, which is this user's alone: so nobody else is asked,
or asks, and no key goes over these sockets. Who may know the answer was decided before. Knows no
more of questions and answers than that they are JSON.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger("headgate.gateway")

ANSWER_S = 2.0  # for one that hangs
QUESTION_MAX_BYTES = 2**20
SUFFIX = ".sock"

Question = Mapping[str, Any]
Answer = Callable[[Question], Awaitable[Any]]


class NotPrivate(Exception):
    """Others than this user could listen in the folder, or ask."""


async def _nothing(_question: Question) -> None:
    return None


class Siblings:
    """As one process sees them. `answer`: what it tells the others; None where it knows nothing."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name`: of this process, among those of the folder. Raises NotPrivate, OSError."""
        found = folder.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise NotPrivate(f"{folder} has to be a folder of this user alone: chmod 700")
        self._folder = folder
        self._own = folder / f"{name}{SUFFIX}"
        self.answer: Answer = _nothing

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answers the others meanwhile."""
        try:
            server = await asyncio.start_unix_server(
                self._serve, self._own, limit=QUESTION_MAX_BYTES
            )
        except OSError as error:  # a path that is too long for a socket, a disk that is full
            log.warning("other gateway processes cannot ask this one for its traces: %s", error)
            yield
            return
        try:
            yield
        finally:
            server.close()
            self._own.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = orjson.loads(await reader.readline())
            writer.write(orjson.dumps({"told": await self.answer(question)}))
            await writer.drain()
        except (ConnectionError, ValueError):  # one that has gone, or was cut off
            log.debug("a question of another gateway process was not answered", exc_info=True)
        finally:
            writer.close()

    async def ask(self, question: Question) -> tuple[list[Any], int]:
        """What those say who know something, and how many were asked."""
        others = [path for path in self._folder.glob(f"*{SUFFIX}") if path != self._own]
        told = await asyncio.gather(*(_told(path, question) for path in others))
        answers = [one["told"] for one in told if one is not None]
        return [one for one in answers if one is not None], len(answers)


async def _told(path: Path, question: Question) -> Mapping[str, Any] | None:
    """What one says; None for one that is away."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(orjson.dumps(question) + b"\n")
                return dict(orjson.loads(await reader.read()))
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return None
