"""The other gateway processes of one `headgate serve`, asked for what each of them alone keeps.

Each listens in one folder of the file system, which is this user's alone: so nobody else is asked,
or asks, and no key goes over these sockets. Who may know the answer was decided before. Knows no
more of questions and answers than that they are JSON, and that an answer comes in parts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from gateway.pause import Pause

log = logging.getLogger("headgate.gateway")

# For an answer, which one that is busy gives slowly: without a further part of it, and in all.
SILENT_S = 1.0
WHOLE_S = 4.0
QUESTION_MAX_BYTES = 2**20
PART_MAX_BYTES = 2**20  # of its JSON; the bytes behind it are as many as it says
END = b"null\n"  # of an answer, without which it is none
SUFFIX = ".sock"

Question = Mapping[str, Any]
Part = tuple[Any, bytes]  # JSON, and bytes that it speaks of
Answer = Callable[[Question], AsyncIterator[Part]]


class NotPrivate(Exception):
    """Others than this user could listen in the folder, or ask."""


class Siblings:
    """As one process sees them. `answers`: what it tells the others, by what they ask."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name`: of this process, among those of the folder. Raises NotPrivate, OSError."""
        found = folder.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise NotPrivate(f"{folder} has to be a folder of this user alone: chmod 700")
        self.name = name
        self._folder = folder
        self._own = folder / f"{name}{SUFFIX}"
        self.answers: dict[str, Answer] = {}

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answers the others meanwhile."""
        try:
            server = await asyncio.start_unix_server(
                self._serve, self._own, limit=QUESTION_MAX_BYTES
            )
        except OSError as error:  # a path that is too long for a socket, a disk that is full
            log.warning("other gateway processes cannot ask this one for what it knows: %s", error)
            yield
            return
        try:
            yield
        finally:
            server.close()
            self._own.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(WHOLE_S):  # also for one that asks and does not read
                question = orjson.loads(await reader.readline())
                await self._tell(question, writer)
        except (ConnectionError, TimeoutError, ValueError):  # one that has gone, or was cut off
            log.debug("a question of another gateway process was not answered", exc_info=True)
        finally:
            writer.close()

    async def _tell(self, question: Any, writer: asyncio.StreamWriter) -> None:
        what = str(question.get("what")) if isinstance(question, dict) else ""
        if (answer := self.answers.get(what)) is None:
            return
        async for told, piece in answer(question):
            writer.write(orjson.dumps([told, len(piece)]) + b"\n")
            writer.write(piece)
            await writer.drain()
        writer.write(END)
        await writer.drain()

    def _others(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"*{SUFFIX}") if path != self._own)

    def expected(self, count: int) -> list[str]:
        """The names of the processes that there should be; they are numbered where `headgate serve`
        starts them, and of others nobody knows."""
        numbers = [str(at) for at in range(count)]
        return numbers if self.name in numbers else []

    async def ask(
        self, question: Question, silent_s: float = SILENT_S
    ) -> dict[str, list[Part] | None]:
        """By the name of each other process all that it says; None for one that is away, hangs for
        `silent_s`, does not know what is asked, or has gone before the end."""
        others = self._others()
        told = await asyncio.gather(*(_asked(path, question, silent_s) for path in others))
        return {path.stem: parts for path, parts in zip(others, told, strict=True)}


async def _asked(path: Path, question: Question, silent_s: float) -> list[Part] | None:
    """All that one says; None for one that does not come to the end."""
    parts: list[Part] = []
    pause = Pause()  # what lies there already is read without giving anybody the loop
    clock = asyncio.get_running_loop().time
    latest = clock() + WHOLE_S
    try:
        async with asyncio.timeout(silent_s) as patience:
            reader, writer = await asyncio.open_unix_connection(path, limit=PART_MAX_BYTES)
            try:
                writer.write(orjson.dumps(question) + b"\n")
                while (line := await reader.readline()) != END:
                    told, size = orjson.loads(line)
                    parts.append((told, await reader.readexactly(size)))
                    await pause()
                    patience.reschedule(min(clock() + silent_s, latest))
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError, ValueError):
        return None
    return parts
