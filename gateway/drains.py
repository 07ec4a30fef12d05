"""Replicas that an operator has taken out by hand, as all gateways know it.

A note for each URL, of which the latest counts: kept in the store that gateways share, and told at
once to the other processes of one `headgate serve`. Knows no request: what a replica takes it says
itself (`Replica.takes`); what runs there goes on to its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from cache.store import StoreDown, key
from gateway.edge import Edge, Live
from gateway.presence import Presence
from gateway.problems import quote
from gateway.replica import Replica
from gateway.siblings import Part, Question

log = logging.getLogger("headgate.gateway")

RECORD = key("drains")
MARKS = key("drains", "present")
KEPT_S = 30 * 86400.0  # in a store, with no gateway that would remember; of a note that ended one
LOOK_S = 0.5  # between looks at the store
ASK_S = 5.0  # between questions to siblings, which are told at once: one may have been busy
TRIES = 8  # of a change that another gateway has crossed
STEP_S = 1e-3  # a later note is later by any clock
# A drain is forgotten when no gateway has had its replica for so long: its address may be another's
# by then. Longer than a machine takes to start anew.
FORGOTTEN_S = 15 * 60.0
REVIEW_S = 30.0  # between looks at who has the drained ones
WHAT = "drains"  # a question to siblings


@dataclass(frozen=True, slots=True)
class Note:
    """What was said last of one replica."""

    url: str
    out: bool  # it takes nothing new
    why: str
    at: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Requests by replica, and of how many processes, as far as they could be asked."""

    by_url: Mapping[str, int]
    asked: int
    of: int


class Drains:
    """As one process knows them."""

    def __init__(
        self,
        live: Live,
        beside: Callable[[], Edge | None],
        clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`beside`: the edge of a rollout's candidate, while there is one."""
        self._live = live
        self._beside = beside
        self._clock = clock
        self._now = now
        self._notes: dict[str, Note] = {}
        self._presence = Presence(clock, now)
        self._state = live.edge.state
        self._answered = 0  # siblings, when they were asked last
        if self._state.siblings is not None:
            self._state.siblings.answers[WHAT] = self._answer

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Knows what others know before anything is served, and goes on hearing it."""
        await self._ask_siblings()
        await self._look()
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        asked_at, reviewed_at = self._clock(), self._now()
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()
            if self._now() - reviewed_at >= REVIEW_S:
                reviewed_at = self._now()
                await self.review()
            if not 0 <= self._clock() - asked_at < ASK_S:
                asked_at = self._clock()
                await self._ask_siblings()

    async def change(self, url: str, *, out: bool, why: str = "") -> None:
        """Says of a replica whether it takes anything new: here from now on, at siblings when this
        returns, and at gateways that share a store at their next look."""
        known = self._notes.get(url)
        at = self._clock() if known is None else max(self._clock(), known.at + STEP_S)
        self._notes[url] = Note(url, out, why, at)
        self.apply()
        log.warning(
            "%s is %s: %s",
            url,
            "drained" if out else "back",
            quote(why) if why else "no reason given",
        )
        await asyncio.gather(self._look(), self._ask_siblings())

    async def review(self) -> None:
        """Forgets drains of replicas that no gateway has any more."""
        drained = {note.url for note in self._notes.values() if note.out}
        here = {one.url for one in self.replicas() if not one.gone}
        edges = (self._live.edge, *self._live.edges)
        blind = any(edge.pool.looks_fail for edge in edges)  # whoever is there is not seen
        self._presence.look(drained, lambda url: blind or url in here)
        if not drained or not await self._share_marks():
            return
        for url in self._presence.absent(FORGOTTEN_S):
            note = self._notes[url]
            log.warning(
                "%s was drained (%s), and no gateway has had it for %.0f minutes: that is "
                "forgotten, a replica at that address takes requests",
                url,
                quote(note.why) if note.why else "no reason given",
                FORGOTTEN_S / 60,
            )
            at = max(self._clock(), note.at + STEP_S)
            self._notes[url] = Note(url, False, "nobody has it any more", at)
        self.apply()

    async def _share_marks(self) -> bool:
        """With gateways that share the store; False where it is away, and they cannot be heard."""
        store, far = self._state.store, self._state.far
        if far is not None and not far.up:
            return False
        try:
            for _ in range(TRIES):
                data = await store.get(MARKS)
                self._presence.hear(orjson.loads(data) if data is not None else {})
                told = orjson.dumps(self._presence.told(), option=orjson.OPT_SORT_KEYS)
                if told == data or await store.swap(MARKS, data, told, KEPT_S):
                    return True
        except StoreDown:
            return False
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("which drained replicas other gateways have cannot be read: %s", error)
        return False

    def note(self, url: str) -> Note | None:
        """Of a replica that is out."""
        known = self._notes.get(url)
        return known if known is not None and known.out else None

    def replicas(self) -> Iterator[Replica]:
        """Of every edge that has requests or may get some, each once."""
        edges = [*self._live.edges, self._beside()]
        found = (one for edge in edges if edge is not None for one in edge.pool.replicas)
        yield from dict.fromkeys(found)

    def apply(self) -> None:
        """Brings replicas in line with the notes; those that a policy or a source has brought since
        were not there to hear."""
        for replica in self.replicas():
            note = self.note(replica.url)
            replica.held = "" if note is None else note.why or "an operator drained it"

    # ---- what others know -----------------------------------------------------------------------

    async def _look(self) -> None:
        """Hears from the store and tells it what it lacks, whoever else does so at once."""
        store = self._state.store
        try:
            for _ in range(TRIES):
                data = await store.get(RECORD)
                self._hear(_read(data))
                told = self._dumped() if self._notes else data
                if told == data or await store.swap(RECORD, data, told, KEPT_S):
                    return
        except StoreDown:
            return  # it is told when it is back
        except (ValueError, TypeError) as error:
            log.warning("what other gateways tell of drained replicas cannot be read: %s", error)

    async def _ask_siblings(self) -> dict[str, int]:
        """Hears from the other processes and tells them; what they have under way, by replica."""
        siblings = self._state.siblings
        if siblings is None:
            return {}
        question = {"what": WHAT, **self._told()}
        running: dict[str, int] = {}
        answers = await siblings.ask(question)
        for parts in answers.values():
            for told, _ in parts or ():
                self._hear(_notes(told["notes"]))
                self._presence.hear(told.get("present", {}))
                for url, count in told["in_flight"].items():
                    running[url] = running.get(url, 0) + count
        self._answered = sum(parts is not None for parts in answers.values())
        return running

    async def _answer(self, question: Question) -> AsyncIterator[Part]:
        self._hear(_notes(question.get("notes", ())))
        self._presence.hear(question.get("present", {}))
        yield {**self._told(), "in_flight": self._own()}, b""

    def _told(self) -> dict[str, Any]:
        notes = [asdict(one) for one in self._notes.values()]
        return {"notes": notes, "present": self._presence.told()}

    def _hear(self, told: Iterable[Note]) -> None:
        """The latest note of each replica counts; ends of drains are forgotten in the end."""
        for note in told:
            known = self._notes.get(note.url)
            if known is None or note.at > known.at:
                self._notes[note.url] = note
        oldest = self._clock() - KEPT_S
        for url in [one.url for one in self._notes.values() if not one.out and one.at < oldest]:
            del self._notes[url]
        self.apply()

    def _dumped(self) -> bytes:
        return orjson.dumps([asdict(self._notes[url]) for url in sorted(self._notes)])

    # ---- what is still under way ----------------------------------------------------------------

    async def under_way(self) -> UnderWay:
        """Requests on each replica, of all gateways that can be asked or tell the store."""
        by_url = self._own()
        state, settings = self._state, self._live.edge.settings
        if state.others is not None:
            elsewhere, heard = await state.others.under_way()
        else:
            elsewhere = await self._ask_siblings()
            heard = self._answered
        for url, count in elsewhere.items():
            by_url[url] = by_url.get(url, 0) + count
        asked = 1 + heard
        return UnderWay(by_url, asked, max(asked, state.processes(settings)))

    def _own(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for replica in self.replicas():
            found[replica.url] = found.get(replica.url, 0) + replica.in_flight
        return found

    def payload(self, url: str) -> dict[str, Any] | None:
        """Why a replica is out and since when, for people."""
        note = self.note(url)
        return None if note is None else {"why": note.why, "at": note.at}


def _read(data: bytes | None) -> list[Note]:
    """Raises ValueError and TypeError for a record of another version."""
    return [] if data is None else _notes(orjson.loads(data))


def _notes(told: Iterable[Mapping[str, Any]]) -> list[Note]:
    return [Note(**one) for one in told]
