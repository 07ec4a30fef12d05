"""The sockets of a model publisher, in the framings that vLLM and SGLang have had."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import zmq

from tests.gateway.publisher import Publisher

END = (-1).to_bytes(8, "big", signed=True)
Replay = Callable[[int], Iterator[list[bytes]]]


class Sockets:
    """PUB (as XPUB, which is one that shows who subscribes) and ROUTER of one life of a publisher.
    `topics`: replays have a topic frame, as they have it since vLLM 0.12; before they had none."""

    def __init__(
        self, publisher: Publisher, live: str, replay: str, *, topics: bool, connects: bool
    ) -> None:
        self.publisher = publisher
        self.topics = topics
        self.asked: list[int] = []
        self.context = zmq.Context()
        self.live = self.context.socket(zmq.XPUB)
        self.live.setsockopt(zmq.XPUB_VERBOSE, 1)  # also one that comes back
        self.replayer = self.context.socket(zmq.ROUTER)
        if connects:
            self.live.connect(live)
        else:
            self.live.bind(live)
        self.replayer.bind(replay)
        self.answer: Replay = self.all_of

    def frames(self, number: int, payload: bytes) -> list[bytes]:
        return [b"kv@pod@m", number.to_bytes(8, "big"), payload]

    async def subscribed(self) -> None:
        """A follower is connected before its subscription is here: what is published between is
        published to nobody."""
        while not self.live.poll(0) or not self.live.recv().startswith(b"\1"):  # noqa: ASYNC110  # as serve
            await asyncio.sleep(0.002)

    def publish(self, *, lose: int = 0) -> None:
        """Everything that waits; the first `lose` batches never arrive anywhere."""
        outbox = self.publisher.outbox
        for _ in range(lose):
            outbox.popleft()
        while outbox:
            self.live.send_multipart(self.frames(*outbox.popleft()))

    def all_of(self, start: int) -> Iterator[list[bytes]]:
        for number, payload in self.publisher.replay(start):
            frames = self.frames(number, payload)
            yield frames if self.topics else frames[1:]
        yield [b"", END, b""] if self.topics else [END, b""]

    async def serve(self) -> None:
        """Answers replays until cancelled."""
        while True:
            if not self.replayer.poll(0):
                await asyncio.sleep(0.002)
                continue
            client, empty, start = self.replayer.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for frames in self.answer(self.asked[-1]):
                with contextlib.suppress(zmq.Again):
                    self.replayer.send_multipart([client, empty, *frames], zmq.NOBLOCK)


@contextlib.asynccontextmanager
async def sockets(
    publisher: Publisher, live: str, replay: str, *, topics: bool = True, connects: bool = False
) -> AsyncIterator[Sockets]:
    one = Sockets(publisher, live, replay, topics=topics, connects=connects)
    serving = asyncio.create_task(one.serve())
    try:
        yield one
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        one.context.destroy(linger=0)
