"""One page of metrics of all gateway processes behind one port, whichever of them is asked.

Each writes its own samples, under a label of its own, and the one that is asked puts them together
by metric. Nothing is added up: a process that starts anew begins its own series again, and of a sum
that has gone back nobody knows why. Knows no metric.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway.call import request_id
from gateway.edge import Live
from gateway.exposition import Format
from gateway.metrics import TOLD, Reading, families
from gateway.pause import Pause
from gateway.reply import Reply
from gateway.siblings import Part, Question

WHAT = "metrics"
PART_BYTES = 2**16  # to a sibling at once, or one metric
PIECE_BYTES = 2**18  # to who scrapes

Metric = tuple[str, str, bytes]  # its name, its head, its samples


class Scrape:
    """`GET /metrics`, as ASGI application."""

    def __init__(self, live: Live, rollout: Callable[[], Mapping[str, Any] | None]) -> None:
        """`rollout`: the one that this process goes by."""
        self._live = live
        self._rollout = rollout
        self._siblings = live.edge.state.siblings
        if self._siblings is not None:
            self._siblings.answers[WHAT] = self._for_others

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
        form = Format.of(accept, self._siblings.name if self._siblings is not None else "")
        page = await self.page(form)
        reply = Reply(send, request_id(scope["headers"]))
        await reply.in_pieces(200, [(b"content-type", form.content_type)], page)

    async def page(self, form: Format) -> list[bytes]:
        """In pieces, as it is sent."""
        question = {"what": WHAT, "openmetrics": form.openmetrics}
        if self._siblings is None:
            page = _together([await self._own(form)])
        else:
            own, others = await asyncio.gather(self._own(form), self._siblings.ask(question))
            found = [list(_metrics(parts)) for parts in others.values() if parts is not None]
            page = _together([own, *found])
            expected = self._siblings.expected(self._live.edge.settings.processes)
            there = dict.fromkeys(expected, 0.0) | {form.process: 1.0}
            there |= {name: float(parts is not None) for name, parts in others.items()}
            up: dict[tuple[str, ...], float] = {(name,): there[name] for name in sorted(there)}
            samples = Format(form.openmetrics).samples(TOLD.name, TOLD.labels, up)
            page.append((form.head(TOLD.name, "gauge", TOLD.text) + samples).encode())
        page.append(form.end.encode())
        return await _pieces(page)

    async def _own(self, form: Format) -> list[Metric]:
        return [metric async for metric in told(self._reading(), form)]

    async def _for_others(self, question: Question) -> AsyncIterator[Part]:
        assert self._siblings is not None
        form = Format(question["openmetrics"] is True, self._siblings.name)
        gathered: list[Metric] = []
        size = 0
        async for metric in told(self._reading(), form):
            gathered.append(metric)
            size += len(metric[2])
            if size > PART_BYTES:
                yield _part(gathered)
                gathered, size = [], 0
        yield _part(gathered)

    def _reading(self) -> Reading:
        return Reading(self._live, self._rollout(), time.time())


def _part(metrics: list[Metric]) -> Part:
    """Several metrics; their samples lie behind each other."""
    heads = [(name, head, len(samples)) for name, head, samples in metrics]
    return heads, b"".join([samples for _, _, samples in metrics])


def _metrics(parts: list[Part]) -> Iterator[Metric]:
    """What was made parts of."""
    for heads, samples in parts:
        at = 0
        for name, head, size in heads:
            yield name, head, samples[at : at + size]
            at += size


async def told(reading: Reading, form: Format) -> AsyncIterator[Metric]:
    """Each metric, written in pieces between which streams go on."""
    pause = Pause()
    for name, head, pieces in families(reading, form):
        written: list[str] = []
        for piece in pieces:
            written.append(piece)
            await pause()
        yield name, head, "".join(written).encode()


def _together(pages: Iterable[Iterable[Metric]]) -> list[bytes]:
    """Each metric under one head. The processes are usually of one version, but while an upgrade
    lies on the disk one that was started anew may know other metrics."""
    found: dict[str, list[bytes]] = {}
    for page in pages:
        for name, head, samples in page:
            found.setdefault(name, [head.encode()]).append(samples)
    return [piece for pieces in found.values() for piece in pieces]


async def _pieces(page: Iterable[bytes]) -> list[bytes]:
    """As few as can be, each of so many bytes at most."""
    pause = Pause()
    pieces: list[bytes] = []
    gathered: list[bytes] = []
    size = 0
    for one in page:
        for at in range(0, len(one), PIECE_BYTES):
            part = one[at : at + PIECE_BYTES]
            if size + len(part) > PIECE_BYTES:
                pieces.append(b"".join(gathered))
                gathered, size = [], 0
                await pause()
            gathered.append(part)
            size += len(part)
    return [*pieces, b"".join(gathered)]
