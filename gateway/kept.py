"""What is kept of requests that have ended, traces and receipts: here, and by other processes.

Who may read them is known to those who ask. Nothing here is on a request's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.edge import Edge, Live
from gateway.siblings import Part, Question
from gateway.sieve import Sieve, sift
from gateway.trace_ring import told
from gateway.trail import Trail, now

QUESTIONS = ("trace", "traces", "receipt", "receipts", "requests", "tenants")
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
            live.edge.state.siblings.answers |= dict.fromkeys(QUESTIONS, self._for_others)

    async def trace(self, name: str) -> tuple[dict[str, Any] | None, Asked]:
        """By the id of trace, request, receipt or answer; with what our workers remember of it."""
        return await self._first({"what": "trace", "name": name})

    async def traces(self, limit: int, *, slow: bool) -> tuple[list[dict[str, Any]], Asked]:
        """The latest first; with `slow`, those that took longest."""
        lists, asked = await self._all({"what": "traces", "limit": limit, "slow": slow})
        order = (lambda one: one["e2e_s"]) if slow else (lambda one: one["started_at"])
        if len(lists) > 1:  # one alone is in the order in which they ended
            return sorted((t for one in lists for t in one), key=order, reverse=True)[:limit], asked
        return lists[0], asked

    async def receipt(self, name: str, tenant: str | None) -> tuple[dict[str, Any] | None, Asked]:
        """Of that tenant alone; None: of whomever."""
        return await self._first({"what": "receipt", "name": name, "tenant": tenant})

    async def receipts(self, tenant: str) -> tuple[list[dict[str, Any]], Asked]:
        """All of a tenant, the earliest first."""
        lists, asked = await self._all({"what": "receipts", "tenant": tenant})
        return sorted((one for some in lists for one in some), key=lambda one: one["at"]), asked

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
            case {"what": "traces", "limit": limit, "slow": slow}:
                return self._live.edge.tracer.ring.recent(limit, slow=slow)
            case {"what": "receipt", "name": name, "tenant": tenant}:
                for edge in self._edges():
                    kept = edge.routing.receipts.get(name)
                    if kept is not None and tenant in (None, kept.tenant):
                        return kept.payload()
            case {"what": "requests", "asked": asked}:
                ring = self._live.edge.tracer.ring
                return await sift(ring, Sieve.of(asked), ring.latest)
            case {"what": "tenants"}:
                return self._live.edge.admission.tallies.tenants.told(now())
            case {"what": "receipts", "tenant": tenant}:
                latest = {
                    one.id: one
                    for edge in self._edges()
                    for one in edge.routing.receipts.latest(tenant)
                }
                return [one.payload() for one in latest.values()]
        return None

    async def _for_others(self, question: Question) -> AsyncIterator[Part]:
        yield None, orjson.dumps(await self._own(question))  # longer than what speaks of a part

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

    async def _elsewhere(self, question: Question) -> tuple[list[Any], Asked]:
        edge = self._live.edge
        siblings = edge.state.siblings
        told = await siblings.ask(question, ANSWER_S) if siblings is not None else {}
        answers = [orjson.loads(parts[0][1]) for parts in told.values() if parts]
        asked = 1 + len(answers)
        of = max(asked, edge.state.processes(edge.settings))
        return [one for one in answers if one is not None], Asked(asked, of)
