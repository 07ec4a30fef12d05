"""One connection to Redis on which commands that come together travel together.

Knows bytes and deadlines, not what the commands mean. What is asked while an answer is under way
waits for the next journey, so that under load one write carries many commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Connection
from redis.exceptions import RedisError, ResponseError

from cache.store import StoreDown

CONNECT_S = 1.0  # TCP, TLS, AUTH and SELECT
BUSY_S = 0.005  # a timer that comes so late says that the event loop was held up
TOGETHER_MAX = 128  # commands in one write
WAITING_MAX = 4096  # commands; more are refused at once

Word = bytes | str | int | float
Order = tuple[tuple[Word, ...], asyncio.Future[Any]]


class Lane:
    """Connects when it is first used, and again after an error."""

    def __init__(self, connect: Callable[[], Connection], timeout_s: float) -> None:
        self._connect = connect
        self._timeout_s = timeout_s  # of one journey
        self._connection: Connection | None = None
        self._waiting: deque[Order] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def ask(self, *words: Word) -> Any:
        """The answer to one command. Raises ResponseError when Redis refuses it, else StoreDown."""
        if len(self._waiting) >= WAITING_MAX:
            raise StoreDown(f"{WAITING_MAX} commands wait for Redis already")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((words, answer))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await answer

    async def aclose(self) -> None:
        """Ends the connection; what waits fails."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self._hang_up()
        self._fail(self._take(), StoreDown("the store is closed"))

    async def _run(self) -> None:
        orders: list[Order] = []
        try:
            while orders := self._take(TOGETHER_MAX):
                await self._travel(orders)
        except (RedisError, OSError, TimeoutError) as error:
            await self._hang_up()
            why = str(error) or f"no answer within {self._timeout_s:g} s"
            self._fail(orders + self._take(), StoreDown(f"Redis: {why}"))
        except BaseException:  # cancelled: nobody else may wait for what was under way
            self._fail(orders, StoreDown("the store is closed"))
            raise
        finally:
            self._runner = None

    def _take(self, most: int = WAITING_MAX) -> list[Order]:
        """What waits, without those who have given up."""
        taken: list[Order] = []
        while self._waiting and len(taken) < most:
            order = self._waiting.popleft()
            if not order[1].done():
                taken.append(order)
        return taken

    async def _travel(self, orders: list[Order]) -> None:
        connection = self._connection
        if connection is None or not connection.is_connected:
            connection = self._connection = self._connect()
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis's
        async with self._in_time():
            packed = connection.pack_commands([words for words, _ in orders])
            await connection.send_packed_command(packed, check_health=False)
            for _, answer in orders:
                try:
                    said = await connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    said = error
                if answer.done():  # its caller has given up; the answer had to be read all the same
                    continue
                if isinstance(said, ResponseError):
                    answer.set_exception(said)
                else:
                    answer.set_result(said)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """TimeoutError after `timeout_s`; where this process was busy meanwhile, as long again: the
        answer may lie there unread."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            timer: asyncio.TimerHandle

            def arm() -> asyncio.TimerHandle:
                due_s = loop.time() + self._timeout_s
                return loop.call_at(due_s, look, due_s)

            def look(due_s: float) -> None:
                nonlocal timer
                if loop.time() - due_s > BUSY_S:
                    timer = arm()
                else:
                    limit.reschedule(loop.time())

            timer = arm()
            try:
                yield
            finally:
                timer.cancel()

    async def _hang_up(self) -> None:
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
            self._connection = None

    def _fail(self, orders: list[Order], error: StoreDown) -> None:
        for _, answer in orders:
            if not answer.done():
                answer.set_exception(error)
