"""The seam between the engine's thread and the event loop: outputs in, cancellations out.

Knows keys and outputs; knows neither HTTP nor how tokens are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many

from runtime.engine import Engine
from runtime.inbox import Order
from runtime.sequence import Output


class ClientGone(Exception):
    """The client closed its connection; its sequences are cancelled."""


class Stream:
    """The outputs of one request's sequences, in the order of their making."""

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys
        self._arrived: list[Output] = []
        self._wake = asyncio.Event()
        self._gone = False

    def push(self, output: Output) -> None:
        self._arrived.append(output)
        self._wake.set()

    def leave(self) -> None:
        """Ends the wait of `next` with ClientGone."""
        self._gone = True
        self._wake.set()

    async def next(self) -> list[Output]:
        """Everything that has come since the last call, at least one output."""
        await self._wake.wait()
        if self._gone:
            raise ClientGone
        self._wake.clear()
        arrived, self._arrived = self._arrived, []
        return arrived


class Streams:
    """All open streams. Lives in the event loop; only `emit` is called from the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_key: dict[int, Stream] = {}
        self.late_tokens = 0  # that were made for clients that had left

    def open(self, engine: Engine, orders: Many[Order]) -> Stream:
        """Submits the orders and listens for their outputs. Raises what `Engine.submit` raises."""
        # No await in between: an output cannot be delivered before its stream is known.
        stream = Stream(engine.submit(orders))
        self._by_key.update(dict.fromkeys(stream.keys, stream))
        return stream

    def close(self, engine: Engine, stream: Stream) -> None:
        """Cancels what of the stream still runs."""
        running = [key for key in stream.keys if self._by_key.pop(key, None)]
        if running:
            engine.cancel(running)

    def emit(self, outputs: list[Output]) -> None:
        """One wake-up of the event loop a step, whatever the number of sequences."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._by_key.get(output.key)
            if stream is None:
                self.late_tokens += len(output.token_ids)
                continue
            stream.push(output)
            if output.finish_reason:
                del self._by_key[output.key]

    def __len__(self) -> int:
        return len(set(map(id, self._by_key.values())))
