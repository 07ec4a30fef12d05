"""The other gateway processes of one `headgate serve`, asked for what each of them alone keeps.

Each listens in one folder of the file system, which is this user's alone: so nobody else is asked,
or asks, and no key goes over these sockets. Who may know the answer was decided before. Knows no
more of questions and answers than that they are JSON, and that long ones come in parts.
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
# Of an answer in parts, which one that is busy gives slowly: without a further one, and in all.
SILENT_S = 1.0
WHOLE_S = 4.0
QUESTION_MAX_BYTES = 2**20
PART_MAX_BYTES = 2**20  # of its JSON; the bytes behind it are as many as it says
END = b"null\n"  # of an answer in parts, without which it is none
SUFFIX = ".sock"

Question = Mapping[str, Any]
Answer = Callable[[Question], Awaitable[Any]]
Part = tuple[Any, bytes]  # JSON, and bytes that it speaks of
Parts = Callable[[Question], AsyncIterator[Part]]


class NotPrivate(Exception):
    """Others than this user could listen in the folder, or ask."""


async def _nothing(_question: Question) -> None:
    return None


class Siblings:
    """As one process sees them. `answer`: what it tells the others, None where it knows nothing;
    `parts`: by what is asked, how long answers are told in its place."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name`: of this process, among those of the folder. Raises NotPrivate, OSError."""
        found = folder.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise NotPrivate(f"{folder} has to be a folder of this user alone: chmod 700")
        self.name = name
        self._folder = folder
        self._own = folder / f"{name}{SUFFIX}"
        self.answer: Answer = _nothing
        self.parts: dict[str, Parts] = {}

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
        if (parts := self.parts.get(what)) is not None:
            async for told, piece in parts(question):
                writer.write(orjson.dumps([told, len(piece)]) + b"\n")
                writer.write(piece)
                await writer.drain()
            writer.write(END)
        else:
            writer.write(orjson.dumps({"told": await self.answer(question)}))
        await writer.drain()

    def _others(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"*{SUFFIX}") if path != self._own)

    async def ask(self, question: Question) -> tuple[list[Any], int]:
        """What those say who know something, and how many were asked."""
        told = await asyncio.gather(*(_told(path, question) for path in self._others()))
        answers = [one["told"] for one in told if one is not None]
        return [one for one in answers if one is not None], len(answers)

    async def ask_parts(self, question: Question) -> dict[str, list[Part] | None]:
        """By the name of each other process all that it says; None for one that is away, hangs, or
        has gone before the end."""
        others = self._others()
        told = await asyncio.gather(*(_parts(path, question) for path in others))
        return {path.stem: parts for path, parts in zip(others, told, strict=True)}


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


async def _parts(path: Path, question: Question) -> list[Part] | None:
    """All that one says; None for one that does not come to the end."""
    parts: list[Part] = []
    clock = asyncio.get_running_loop().time
    latest = clock() + WHOLE_S
    try:
        async with asyncio.timeout(SILENT_S) as patience:
            reader, writer = await asyncio.open_unix_connection(path, limit=PART_MAX_BYTES)
            try:
                writer.write(orjson.dumps(question) + b"\n")
                while (line := await reader.readline()) != END:
                    told, size = orjson.loads(line)
                    parts.append((told, await reader.readexactly(size)))
                    patience.reschedule(min(clock() + SILENT_S, latest))
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError, ValueError):
        return None
    return parts
