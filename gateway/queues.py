"""Which waiting request goes next, and which is sent away: pure, moments and chance are arguments.

Tiers by priority; within one, tenants by what they have had; within a tenant's, who is due first.
What is late already lets others be in time. A tier with a reserved share gets it even where tiers
above would take all, and whoever has waited longest gets every twentieth turn after half a minute.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gateway.fairness import Counters, price
from policies.schema import Tier

ACTIVE_S = 60.0  # a tier that nobody asked for during so long leaves its reserved places to others
AGED_S = 30.0
AGED_TURN = 20  # every so manieth turn is the oldest's, once it is aged
PATIENT_S = 300.0  # how long a request to which nothing was promised is taken to wait willingly
RATE_WINDOW_S = 0.5
DEMAND_S = 20.0
SPREADS = 2.0  # standard deviations above that, for bursts
LIKELY_MAX = 0.8  # of the places, at most, are kept for what a tier is likely to need


@dataclass(frozen=True, slots=True)
class Room:
    """What the replicas of a model can take at once."""

    places: int  # sequences
    prompts: int = 1  # that may always be on their way to their first token
    tokens: float = math.inf  # of prompts on their way to their first token, beyond those
    ordered: bool = True  # replicas read the prompts of higher tiers first


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits or runs. Moments are the caller's clock's."""

    tier: str
    tenant: str
    weight: float
    tokens: int  # of the prompt
    answer_tokens: int  # expected
    came: float
    due: float = math.inf  # to be sent to a replica, for its first token to be in time
    streams: bool = True  # so that its first token shows when its prompt has been read
    number: int = 0
    waiting: bool = False
    running: bool = False
    reading: bool = False  # its prompt: the first token has not come
    grant: asyncio.Future[None] | None = None  # the caller's, to be told by
    uncached: int = 0  # tokens that no replica was known to have, when it began to wait

    @property
    def price(self) -> float:
        return price(self.tokens, self.answer_tokens)


@dataclass(slots=True)
class Demand:
    """How many of a tier are there at once, and how much that varies, over the last DEMAND_S."""

    known: float = 0.0  # how much of that time has been seen: until it has, averages are of less
    first: float = 0.0
    second: float = 0.0
    seen_at: float | None = None

    def note(self, count: int, now: float) -> None:
        """There have been `count` since the last note."""
        if self.seen_at is not None:
            weight = 1 - math.exp((self.seen_at - now) / DEMAND_S)
            self.known += weight * (1 - self.known)
            self.first += weight * (count - self.first)
            self.second += weight * (count * count - self.second)
        self.seen_at = now

    def likely(self, count: int) -> float:
        """As many as there mostly are at most; `count` are there now. Requests that come by
        themselves vary by at least the root of their number."""
        if self.known <= 0:
            return 0.0
        mean = self.first / self.known
        variance = self.second / self.known - mean * mean
        middle = max(mean, count)
        return middle + SPREADS * math.sqrt(max(variance, middle))


@dataclass(slots=True)
class Line:
    """One tier: who waits for it, and what of it runs."""

    name: str
    rules: Tier
    counters: Counters = field(default_factory=Counters)
    heaps: dict[str, list[tuple[float, int, Ticket]]] = field(default_factory=dict)
    waiting: int = 0
    uncached: int = 0  # tokens of those that wait
    promised: float = 0.0  # price of those that wait and have a target
    others: float = 0.0  # and of those that have none
    running: int = 0
    reading: int = 0  # prompts on their way to their first token
    reading_tokens: int = 0
    credit: float = 0.0  # what of its share of others' turns it has not had
    asked_at: float = -math.inf
    demand: Demand = field(default_factory=Demand)

    def look(self, now: float) -> None:
        """Notes how many run and wait, before that changes."""
        self.demand.note(self.running + self.waiting, now)

    def kept(self, places: int, *, below: bool) -> int:
        """Places that other tiers leave free for this one: its share, and `below` it, where it has
        a target, as many as it is likely to need."""
        kept = self.share_of(places)
        if below and self.rules.ttft_ms is not None:
            likely = self.demand.likely(self.running + self.waiting)
            kept = max(kept, math.floor(min(likely, LIKELY_MAX * places)))
        return max(0, kept - self.running)

    def share_of(self, places: int) -> int:
        return math.floor(self.rules.reserved_share * places)

    def push(self, ticket: Ticket) -> None:
        heap = self.heaps.get(ticket.tenant)
        if heap is None:
            self.counters.join(ticket.tenant, self.heaps)
            heap = self.heaps[ticket.tenant] = []
        heapq.heappush(heap, (ticket.due, ticket.number, ticket))
        self.waiting += 1
        self.uncached += ticket.uncached
        self._weigh(ticket, ticket.price)

    def remove(self, ticket: Ticket) -> None:
        """Its entry in the heap stays until it comes to the top."""
        self.waiting -= 1
        self.uncached -= ticket.uncached
        self._weigh(ticket, -ticket.price)
        self._clean(ticket.tenant)

    def head(self, now: float) -> Ticket | None:
        """Who of this tier goes next."""
        if not self.heaps:
            return None
        heap = self.heaps[self.counters.next(self.heaps)]
        while heap[0][0] < now:  # late: behind all that may still be in time
            _, number, ticket = heapq.heappop(heap)
            if ticket.waiting:
                self._weigh(ticket, -ticket.price)
                ticket.due = math.inf
                self._weigh(ticket, ticket.price)
                heapq.heappush(heap, (math.inf, number, ticket))
            self._sweep(heap)
        return heap[0][2]

    def _clean(self, tenant: str) -> None:
        heap = self.heaps[tenant]
        self._sweep(heap)
        if not heap:
            del self.heaps[tenant]

    @staticmethod
    def _sweep(heap: list[tuple[float, int, Ticket]]) -> None:
        while heap and not heap[0][2].waiting:
            heapq.heappop(heap)

    def _weigh(self, ticket: Ticket, amount: float) -> None:
        if math.isinf(ticket.due):
            self.others += amount
        else:
            self.promised += amount


class Queue:
    """The requests before one set of replicas."""

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        ranked = sorted(tiers, key=lambda name: tiers[name].priority)
        self.lines = {name: Line(name, tiers[name]) for name in ranked}
        self.waiting = 0
        self.running = 0
        self.reading = 0  # prompts on their way to their first token
        self.rate: float | None = None  # price a second that has gone from here, while some waited
        self._oldest: deque[Ticket] = deque()
        self._numbers = 0
        self._turns = 0
        self._window = (0.0, 0.0)  # its begin, and the price that went since

    # ---- coming and going -----------------------------------------------------------------------

    def offer(self, ticket: Ticket, room: Room, now: float) -> bool:
        """Whether the request goes at once. If not, it is for the caller to `wait` or be gone."""
        line = self.lines[ticket.tier]
        line.asked_at = now
        line.look(now)
        if self.waiting or not self._has_place(line, room, now):
            return False
        if not self._readable(line, ticket, room):
            return False
        line.counters.join(ticket.tenant, ())
        self._go(line, ticket)
        return True

    def wait(self, ticket: Ticket, now: float) -> None:
        if not self.waiting:
            self._window = (now, 0.0)
        self._numbers += 1
        ticket.number = self._numbers
        ticket.waiting = True
        self.lines[ticket.tier].push(ticket)
        self._oldest.append(ticket)
        self.waiting += 1

    def take(self, room: Room, now: float) -> Ticket | None:
        """The next that goes now; None where nobody waits or nobody fits."""
        if not self.waiting:
            return None
        unread = math.inf  # from this priority on, prompts wait for one that is to be read first
        for line, ticket, turn in self._candidates(now):
            if not self._has_place(line, room, now, turn=turn):
                continue
            behind = line.rules.priority >= unread
            if behind and line.running >= line.share_of(room.places):
                continue
            if not self._readable(line, ticket, room):
                unread = min(unread, line.rules.priority)
                continue
            self._stop_waiting(ticket)
            self._credit(line, ticket, turn)
            self._measure(ticket, now)
            self._turns += 1
            self._go(line, ticket)
            return ticket
        return None

    def drop(self, ticket: Ticket) -> None:
        """One that waits goes away."""
        self._stop_waiting(ticket)

    def begin(self, ticket: Ticket) -> None:
        """The first token of one that runs has come."""
        if ticket.reading:
            ticket.reading = False
            line = self.lines[ticket.tier]
            self.reading -= 1
            line.reading -= 1
            line.reading_tokens -= ticket.tokens

    def leave(self, ticket: Ticket, now: float, answer_tokens: int | None = None) -> None:
        """One that runs is done; what its answer had, where that is known."""
        self.begin(ticket)
        line = self.lines[ticket.tier]
        line.look(now)
        ticket.running = False
        line.running -= 1
        self.running -= 1
        if answer_tokens is not None:
            more = price(0, answer_tokens - ticket.answer_tokens)
            line.counters.charge(ticket.tenant, more, ticket.weight)

    # ---- how full it is -------------------------------------------------------------------------

    def wait_s(self, tier: str, *, promised: bool) -> float:
        """How long a new request would wait; 0 while nothing is known."""
        if not self.rate:
            return 0.0
        line = self.lines[tier]
        own = line.promised if promised else line.promised + line.others
        above = sum(
            other.promised + other.others
            for other in self.lines.values()
            if other.rules.priority < line.rules.priority
        )
        wait_s = (above + own) / self.rate
        share = line.rules.reserved_share
        return min(wait_s, own / (share * self.rate)) if share else wait_s

    def shed_chance(self, tier: str, patience_s: float | None) -> float:
        """With what probability a request that would have to wait is sent away.

        Grows from 0, where the queue is half full, to 1, where it is full or the wait is longer
        than the patience; and is never less than what tiers above suffer.
        """
        chance = 0.0
        rank = self.lines[tier].rules.priority
        for name, line in self.lines.items():
            if name != tier and line.rules.priority < rank and line.waiting:
                above_s = line.rules.ttft_ms / 1000 if line.rules.ttft_ms else None
                chance = max(chance, self._fill(line, above_s))
        return max(chance, self._fill(self.lines[tier], patience_s))

    def _fill(self, line: Line, patience_s: float | None) -> float:
        if line.waiting >= line.rules.queue_max:
            return 1.0
        wait_s = self.wait_s(line.name, promised=patience_s is not None)
        full = max(line.waiting / line.rules.queue_max, wait_s / (patience_s or PATIENT_S))
        return min(max(2 * full - 1, 0.0), 1.0)

    # ---- whose turn it is -----------------------------------------------------------------------

    def _candidates(self, now: float) -> Iterator[tuple[Line, Ticket, bool]]:
        """In the order of their turns, and whether it is a turn out of their tier's order; the same
        request may come twice."""
        if self._turns % AGED_TURN == 0:
            oldest = self._oldest[0]
            if now - oldest.came > AGED_S:
                yield self.lines[oldest.tier], oldest, True
        heads = [
            (line, head) for line in self.lines.values() if (head := line.head(now)) is not None
        ]
        for line, head in heads:
            if line.rules.reserved_share and line.credit >= head.price:
                yield line, head, True
        for line, head in heads:
            yield line, head, False

    def _has_place(self, line: Line, room: Room, now: float, *, turn: bool = False) -> bool:
        """Whether one of this tier may run beside what runs, and what is kept for others."""
        if not self.running:
            return True
        if turn:
            return self.running < room.places
        kept = sum(
            other.kept(room.places, below=other.rules.priority < line.rules.priority)
            for other in self.lines.values()
            if other is not line and other.asked_at > now - ACTIVE_S
        )
        return self.running + kept < room.places

    def _readable(self, line: Line, ticket: Ticket, room: Room) -> bool:
        """Whether its prompt would be read soon, behind those that are read before it."""
        if not ticket.streams or self.reading < room.prompts or math.isinf(room.tokens):
            return True
        before = [
            other
            for other in self.lines.values()
            if not room.ordered or other.rules.priority <= line.rules.priority
        ]
        if sum(other.reading for other in before) < room.prompts:
            return True
        return sum(other.reading_tokens for other in before) + ticket.tokens <= room.tokens

    def _go(self, line: Line, ticket: Ticket) -> None:
        ticket.running = True
        line.running += 1
        self.running += 1
        if ticket.streams:
            ticket.reading = True
            self.reading += 1
            line.reading += 1
            line.reading_tokens += ticket.tokens
        line.counters.charge(ticket.tenant, ticket.price, ticket.weight)

    def _stop_waiting(self, ticket: Ticket) -> None:
        ticket.waiting = False
        line = self.lines[ticket.tier]
        line.remove(ticket)
        if not line.waiting:
            line.credit = 0.0
        self.waiting -= 1
        while self._oldest and not self._oldest[0].waiting:
            self._oldest.popleft()

    def _credit(self, line: Line, ticket: Ticket, by_credit: bool) -> None:
        if by_credit:
            line.credit = max(0.0, line.credit - ticket.price)
            return
        for other in self.lines.values():
            if other is not line and other.waiting and other.rules.reserved_share:
                other.credit += other.rules.reserved_share * ticket.price

    def _measure(self, ticket: Ticket, now: float) -> None:
        began, gone = self._window
        gone += ticket.price
        if now - began >= RATE_WINDOW_S:
            seen = gone / (now - began)
            self.rate = seen if self.rate is None else self.rate + 0.3 * (seen - self.rate)
            began, gone = now, 0.0
        self._window = (began, gone)
