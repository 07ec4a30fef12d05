"""Requests to a running stack, and what they say about it: first tokens, speed, what is added.

One client process with one event loop. Every request brings a held-out row that was not sent
before, so that no cache knows it, but for the one question that compares two ways.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import aiohttp

from benchmarks.lab import stack as stacks
from benchmarks.lab.client import Answer, Recording, ask, body_of
from benchmarks.lab.report import MeasurementFailed
from benchmarks.lab.samples import paired_difference, spread
from benchmarks.lab.stack import Stack
from pocket.tasks import TASKS, Row, row

_LONG_TOKENS = 64  # of each stream whose speed is measured
_LEFT_TOKENS = 512  # of an answer that nobody waits for
_LOST_S = 10.0
_SHORT_TOKENS = 8  # of the answers that compare gateway and worker
_SHORT_QUESTION = [{"role": "user", "content": "What is the status of order JR-9265?"}]
_STREAMS = (1, 8)
_SEED = 0


def held_out_rows() -> Iterator[Row]:
    """Rows that training never saw, all tasks in turn, without end; no row comes twice."""
    index = 0
    while True:
        for task in TASKS:
            yield row(task, "test", _SEED, index)
        index += 1


class Load:
    """Requests to one running stack, through one client session."""

    def __init__(self, session: aiohttp.ClientSession, stack: Stack, rows: Iterator[Row]) -> None:
        self._session = session
        self._stack = stack
        self._rows = rows

    async def warm_up(self) -> None:
        """Connections, caches and lazily imported code, on both ways."""
        for url in (self._stack.url, self._stack.worker_url) * 3:
            await self._ask(self._short_body(), url)
        await self._ask(self._long_body(_LONG_TOKENS))

    async def first_tokens(self, count: int) -> dict[str, Any]:
        """One request after another, each answered to its natural end."""
        answers = [(await self._ask(self._greedy_body())).answer() for _ in range(count)]
        first_chunk_ms = [answer.opened_s * 1e3 for answer in answers]
        ttft_ms = [answer.ttft_s * 1e3 for answer in answers]
        tpot_ms = [answer.tpot_s * 1e3 for answer in answers if answer.tokens > 1]
        return {
            "ttft_ms": spread(ttft_ms),
            "first_chunk_ms": spread(first_chunk_ms),
            "tpot_ms": spread(tpot_ms),
        }

    async def speeds(self, repeats: int) -> dict[str, Any]:
        """Tokens a second from the first request to the last byte, in rounds of all sizes."""
        tokens_per_s: dict[int, list[float]] = {streams: [] for streams in _STREAMS}
        tpot_ms: dict[int, list[float]] = {streams: [] for streams in _STREAMS}
        for _ in range(repeats):
            for streams in _STREAMS:
                recordings = await asyncio.gather(
                    *(self._ask(self._long_body(_LONG_TOKENS)) for _ in range(streams))
                )
                answers = [recording.answer() for recording in recordings]
                tokens_per_s[streams].append(_rate(recordings, answers))
                tpot_ms[streams] += [answer.tpot_s * 1e3 for answer in answers]
        return {
            "tokens_per_s": {str(streams): median(tokens_per_s[streams]) for streams in _STREAMS},
            "stream_tpot_ms": {str(streams): spread(tpot_ms[streams]) for streams in _STREAMS},
        }

    async def added_by_gateway(self, pairs: int) -> dict[str, Any]:
        """The same request straight to the worker and through the gateway, in alternating order."""
        direct: list[Answer] = []
        through: list[Answer] = []
        ways = [(self._stack.worker_url, direct), (self._stack.url, through)]
        for _ in range(pairs):
            body = self._short_body()
            for url, answers in ways:
                answers.append((await self._ask(body, url)).answer())
            ways.reverse()
        whole = _added([one.whole_s for one in direct], [one.whole_s for one in through])
        first = _added([one.ttft_s for one in direct], [one.ttft_s for one in through])
        return {
            "gateway_added_ms_p50": whole["p50"],
            "gateway_added_ms": {"whole": whole, "ttft": first},
        }

    async def cpu_costs(self, rounds: int, requests: int) -> dict[str, Any]:
        """CPU time of both processes for answers of one token, and for each token more.

        Short and long rounds take turns; one request after another, so that no chunk shares a
        wake-up with another one.
        """
        watched = {"gateway": self._stack.gateway, "worker": self._stack.worker}
        spent_s = {(name, size): 0.0 for name in watched for size in (1, _LONG_TOKENS)}
        chunks = {1: 0, _LONG_TOKENS: 0}
        for _ in range(rounds):
            for size in chunks:
                before = {name: stacks.cpu_s(process) for name, process in watched.items()}
                recordings = [await self._ask(self._long_body(size)) for _ in range(requests)]
                for name, process in watched.items():
                    spent_s[name, size] += stacks.cpu_s(process) - before[name]
                chunks[size] += sum(recording.answer().chunks for recording in recordings)
        more_chunks = chunks[_LONG_TOKENS] - chunks[1]
        if more_chunks <= 0:
            raise MeasurementFailed("answers of many tokens came in no more chunks than of one")
        return {
            f"{name}_cpu": {
                "ms_per_request": spent_s[name, 1] / (rounds * requests) * 1e3,
                "us_per_chunk": (spent_s[name, _LONG_TOKENS] - spent_s[name, 1])
                / more_chunks
                * 1e6,
            }
            for name in watched
        }

    async def cancellations(self, count: int) -> dict[str, Any]:
        """From a client that leaves in mid-answer to a worker that no longer knows its request.

        Half of them leave before the first token, half after it. Asking the worker takes a few
        milliseconds itself, which count.
        """
        took_ms = []
        for number in range(count):
            url = f"{self._stack.url}/v1/chat/completions"
            response = await self._session.post(url, data=self._long_body(_LEFT_TOKENS))
            if number % 2:
                await response.content.readany()
            closed = perf_counter()
            response.close()
            while await self._streams_of_worker():
                if perf_counter() - closed > _LOST_S:
                    raise MeasurementFailed("the worker still answers a client that has left")
            took_ms.append((perf_counter() - closed) * 1e3)
        taken = spread(took_ms)
        return {"cancel_ms": taken["p95"], "cancel_ms_p50": taken["p50"]}

    async def _streams_of_worker(self) -> int:
        async with self._session.get(f"{self._stack.worker_url}/health") as response:
            return int((await response.json())["streams"])

    def _greedy_body(self) -> bytes:
        """The next row, to be answered to its natural end."""
        return self._row_body(temperature=0, max_tokens=_LONG_TOKENS)

    def _long_body(self, tokens: int) -> bytes:
        """The next row, for exactly `tokens` tokens of whatever text."""
        return self._row_body(temperature=2, seed=_SEED, max_tokens=tokens, ignore_eos=True)

    def _short_body(self) -> bytes:
        """Always the same, so that neither way finds more of it in a cache than the other."""
        fields = {"temperature": 0, "max_tokens": _SHORT_TOKENS, "ignore_eos": True}
        return body_of(self._stack.model, _SHORT_QUESTION, **fields)

    def _row_body(self, **fields: Any) -> bytes:
        one = next(self._rows)
        tools = {"tools": one.tools} if one.tools else {}
        return body_of(self._stack.model, one.messages, **fields, **tools)

    async def _ask(self, body: bytes, url: str | None = None) -> Recording:
        return await ask(self._session, url or self._stack.url, body)


def _rate(recordings: list[Recording], answers: list[Answer]) -> float:
    """Tokens a second of streams that ran together."""
    began = min(recording.sent for recording in recordings)
    ended = max(recording.ended for recording in recordings)
    return sum(answer.tokens for answer in answers) / (ended - began)


def _added(direct_s: list[float], through_s: list[float]) -> dict[str, float]:
    """`p50` is the median over pairs, which follows a drift of the machine; in milliseconds."""
    paired = paired_difference(direct_s, through_s, random.Random(_SEED))
    return {
        "p50": paired.median * 1e3,
        "low": paired.low * 1e3,
        "high": paired.high * 1e3,
        "difference_of_medians": (median(through_s) - median(direct_s)) * 1e3,
        "direct_p50": median(direct_s) * 1e3,
    }
