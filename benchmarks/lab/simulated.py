"""A worker that computes nothing and takes the time for it: batching, chunked prefill, a cache.

A step decodes one token for each running answer and reads a chunk of prompts beside that, as long
as the tightest running target allows. Times are those of an 8B model on one large accelerator, to
an order of magnitude; the gateway that is measured knows none of them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

STEP_S = 0.008  # of a step with one answer
ANSWER_S = 0.0001  # more for each further one
READ_TOKENS_PER_S = 8000.0
CHUNK_TOKENS = 2048
SEQUENCES = 64
TPOT_S = 0.1  # where a request names no target
CACHE_TOKENS = 200_000
BLOCK_CHARS = 64
BLOCK_TOKENS = BLOCK_CHARS // 4


@dataclass(slots=True, eq=False)
class Job:
    """One request at a worker."""

    tokens: int
    answer_tokens: int
    blocks: Sequence[int]  # hashes of the prompt's blocks, each over all before it
    rank: tuple[float, float] = (0.0, 0.0)  # who is read first
    tpot_s: float = TPOT_S
    first: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0  # tokens of the prompt that are not read
    said: int = 0
    cached: int = 0
    gone: bool = False


class Worker:
    """One replica. `fifo`: prompts are read as they come, whatever was promised to them. `slow`:
    how many times longer everything takes."""

    def __init__(self, name: str, *, fifo: bool, slow: float = 1.0) -> None:
        self.identity = name
        self.own = True
        self.healthy = True
        self.models = ("m",)
        self.in_flight = 0
        self._fifo = fifo
        self._slow = slow
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._work = asyncio.Event()

    def submit(self, job: Job) -> None:
        self.in_flight += 1
        self._waiting.append(job)
        self._work.set()

    def leave(self, job: Job) -> None:
        """The job is done, or nobody waits for it any more."""
        self.in_flight -= 1
        job.gone = True

    async def run(self) -> None:
        while True:
            await self._work.wait()
            await self._step()
            if not (self._waiting or self._running):
                self._work.clear()

    async def _step(self) -> None:
        self._admit()
        decoding = [job for job in self._running if not job.left]
        chunks, tokens = self._chunks(decoding)
        step_s = STEP_S + ANSWER_S * len(decoding) if decoding else 0.0
        await asyncio.sleep(self._slow * (step_s + tokens / READ_TOKENS_PER_S + 0.0005))
        for job, count in chunks:
            job.left -= count
        for job in self._running:
            if not job.left:
                job.said += 1
                job.first.set()
                if job.said >= job.answer_tokens:
                    job.done.set()
        self._running = [job for job in self._running if not (job.gone or job.done.is_set())]

    def _admit(self) -> None:
        self._waiting = [job for job in self._waiting if not job.gone]
        if not self._fifo:
            self._waiting.sort(key=lambda job: job.rank)
        while self._waiting and len(self._running) < SEQUENCES:
            job = self._waiting.pop(0)
            job.cached = min(self._look_up(job.blocks), job.tokens - 1)
            job.left = job.tokens - job.cached
            self._running.append(job)

    def _look_up(self, blocks: Sequence[int]) -> int:
        """Tokens of the prompt that are cached; all of it is from now on."""
        known = 0
        for block in blocks:
            if block not in self._cache:
                break
            known += BLOCK_TOKENS
        for block in blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > CACHE_TOKENS // BLOCK_TOKENS:
            self._cache.popitem(last=False)
        return known

    def _chunks(self, decoding: Sequence[Job]) -> tuple[list[tuple[Job, int]], int]:
        """Whose prompts are read in this step, and how much of each."""
        room = CHUNK_TOKENS
        if decoding:
            tightest_s = TPOT_S if self._fifo else min(job.tpot_s for job in decoding)
            spare_s = 0.9 * tightest_s - STEP_S - ANSWER_S * len(decoding)
            room = min(room, max(16, int(spare_s * READ_TOKENS_PER_S)))
        reading = [job for job in self._running if job.left]
        if not self._fifo:
            reading.sort(key=lambda job: job.rank)
        chunks, used = [], 0
        for job in reading:
            count = min(job.left, room - used)
            if count <= 0:
                break
            chunks.append((job, count))
            used += count
        return chunks, used
