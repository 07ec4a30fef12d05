"""What is kept of requests that have ended, traces and receipts: here, and by other processes.

Who may read them is known to those who ask. Nothing here is on a request's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.edge import Edge, Live
from gateway.pause import Pause
from gateway.siblings import Part, Question
from gateway.sieve import Sieve, sift
from gateway.trace_ring import told
from gateway.trail import Trail, now

SHORT = ("trace", "receipt", "requests", "tenants")  # questions with one answer each
ANSWER_S = 2.0  # of a sibling, which may have to ask its workers


@dataclass(frozen=True, slots=True)
class Asked:
    """Of how many gateway processes an answer is made, this one included."""

    asked: int
    of: int  # as far as this one knows of others

    def payload(self) -> dict[str, int]:
        return {"asked": self.asked, "of": self.of}

    def where(self) -> str:
        """For who did not find it."""
        if self.of == 1:
            return "this gateway"
        if self.asked >= self.of:
            return f"each of the {self.of} gateway processes"
        if self.asked > 1:
            return f"each of {self.asked} of {self.of} gateway processes, which answered,"
        return (
            f"this one of {self.of} gateway processes, which cannot ask the others (ask each at "
            "its own address),"
        )


class Kept:
    """Of one process, which asks its siblings for what it does not have."""

    def __init__(self, live: Live, beside: Callable[[], Edge | None]) -> None:
        """`beside`: the edge of a rollout's candidate, while there is one."""
        self._live = live
        self._beside = beside
        if live.edge.state.siblings is not None:
            live.edge.state.siblings.answers |= {
                **dict.fromkeys(SHORT, self._for_others),
                "traces": self._traces,
                "receipts": self._receipts,
            }

    async def trace(self, name: str) -> tuple[dict[str, Any] | None, Asked]:
        """By the id of trace, request, receipt or answer; with what our workers remember of it."""
        return await self._first({"what": "trace", "name": name})

    async def traces(self, limit: int, *, slow: bool) -> tuple[list[orjson.Fragment], Asked]:
        """The latest first; with `slow`, those that took longest."""
        question = {"what": "traces", "limit": limit, "slow": slow}
        lists, asked = await self._in_parts(self._traces(question), question)
        if len(lists) > 1:  # one alone is in the order in which they ended
            lists = [sorted((one for some in lists for one in some), key=_first, reverse=True)]
        return [orjson.Fragment(text) for _, text in lists[0][:limit]], asked

    async def receipt(self, name: str, tenant: str | None) -> tuple[dict[str, Any] | None, Asked]:
        """Of that tenant alone; None: of whomever."""
        return await self._first({"what": "receipt", "name": name, "tenant": tenant})

    async def receipts(self, tenant: str | None) -> tuple[list[orjson.Fragment], Asked]:
        """All of a tenant, the earliest first; None: of all of them."""
        question = {"what": "receipts", "tenant": tenant}
        lists, asked = await self._in_parts(self._receipts(question), question)
        every = sorted((one for some in lists for one in some), key=_first)
        return [orjson.Fragment(text) for _, text in every], asked

    async def sifted(self, asked: Mapping[str, str]) -> tuple[list[dict[str, Any]], Asked]:
        """By what stands in a query: what each process has of it."""
        return await self._all({"what": "requests", "asked": asked})

    async def tenants(self) -> tuple[list[dict[str, Any]], Asked]:
        """What each process counted of them."""
        return await self._all({"what": "tenants"})

    # ---- of this process ------------------------------------------------------------------------

    async def _own(self, question: Question) -> Any:
        """None for what it does not have."""
        match question:
            case {"what": "trace", "name": name}:
                found = self._live.edge.tracer.ring.trail(name)
                return None if found is None else await self._whole(found)
            case {"what": "receipt", "name": name, "tenant": tenant}:
                for edge in self._edges():
                    kept = edge.routing.receipts.get(name)
                    if kept is None:  # the request's own id, its trace's, its answer's
                        trail = edge.tracer.ring.trail(name)
                        kept = trail.receipt if trail is not None else None
                    if kept is not None and tenant in (None, kept.tenant):
                        return kept.payload()
            case {"what": "requests", "asked": asked}:
                ring = self._live.edge.tracer.ring
                return await sift(ring, Sieve.of(asked), ring.latest)
            case {"what": "tenants"}:
                return self._live.edge.admission.tallies.tenants.told(now())
        return None

    async def _for_others(self, question: Question) -> AsyncIterator[Part]:
        yield None, orjson.dumps(await self._own(question))  # longer than what speaks of a part

    async def _traces(self, question: Question) -> AsyncIterator[Part]:
        """Each with what they are ordered by; others go on in between."""
        pause, slow = Pause(), question["slow"]
        for trail in self._live.edge.tracer.ring.first(question["limit"], slow=slow):
            await pause()
            yield trail.e2e_s if slow else trail.at, orjson.dumps(told(trail))

    async def _receipts(self, question: Question) -> AsyncIterator[Part]:
        """As they are now: requests go on meanwhile, and theirs with them."""
        pause, tenant = Pause(), question["tenant"]
        latest = {
            one.id: one for edge in self._edges() for one in edge.routing.receipts.latest(tenant)
        }
        for one in latest.values():
            await pause()
            yield one.at, orjson.dumps(one)

    def _edges(self) -> Iterator[Edge]:
        yield self._live.edge
        if (beside := self._beside()) is not None:
            yield beside

    async def _whole(self, trail: Trail) -> dict[str, Any]:
        whole = told(trail)
        whole["spans"] += await self._of_workers(trail)
        return whole

    async def _of_workers(self, trail: Trail) -> list[Any]:
        """The spans that workers of ours keep of it; nothing of those that are gone."""
        replicas = {hop.replica.url: hop.replica for hop in trail.asked_of if hop.replica.own}
        path = f"/traces/{trail.trace_id}"
        pool = self._live.edge.pool
        answers = await asyncio.gather(*(pool.ask(one, path) for one in replicas.values()))
        own = {hop.span_id for hop in trail.asked_of}  # a trace may hold other requests, too
        spans = [span for answer in answers if answer for span in answer.get("spans", ())]
        return [span for span in spans if span.get("root") in own]

    # ---- and of the others ----------------------------------------------------------------------

    async def _first(self, question: Question) -> tuple[Any, Asked]:
        own = await self._own(question)
        if own is not None:
            return own, Asked(1, 1)
        found, asked = await self._elsewhere(question)
        return (found[0] if found else None), asked

    async def _all(self, question: Question) -> tuple[list[Any], Asked]:
        own = await self._own(question)
        found, asked = await self._elsewhere(question)
        return [own, *found], asked

    async def _in_parts(
        self, own: AsyncIterator[Part], question: Question
    ) -> tuple[list[Sequence[Part]], Asked]:
        """What each process has, this one first: long lists, whose texts nobody reads on the
        way."""
        lists: list[Sequence[Part]] = [[one async for one in own]]
        lists += await self._asked(question)
        return lists, self._among(len(lists) - 1)

    async def _elsewhere(self, question: Question) -> tuple[list[Any], Asked]:
        told = await self._asked(question)
        answers = [orjson.loads(parts[0][1]) for parts in told if parts]
        return [one for one in answers if one is not None], self._among(len(answers))

    async def _asked(self, question: Question) -> list[list[Part]]:
        """What each sibling says that comes to the end of it."""
        siblings = self._live.edge.state.siblings
        told = await siblings.ask(question, ANSWER_S) if siblings is not None else {}
        return [parts for parts in told.values() if parts is not None]

    def _among(self, answered: int) -> Asked:
        """Of so many siblings."""
        edge = self._live.edge
        return Asked(1 + answered, max(1 + answered, edge.state.processes(edge.settings)))


def _first(part: Part) -> float:
    return float(part[0])
