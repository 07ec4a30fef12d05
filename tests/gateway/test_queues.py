"""Who goes next, and who is sent away: the pure queue under many orders of events."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from gateway.fairness import Counters, price
from gateway.queues import AGED_S, AGED_TURN, PATIENT_S, Queue, Room, Ticket
from policies.schema import Gateway, Tier

TIERS = Gateway().tiers
NAMES = tuple(TIERS)


def ticket(tier: str = "standard", tenant: str = "t", came: float = 0.0, **more: object) -> Ticket:
    given = {"weight": 1.0, "tokens": 100, "answer_tokens": 50} | more
    return Ticket(tier, tenant, came=came, **given)  # type: ignore[arg-type]


@dataclass
class World:
    """A queue with replicas that finish when they are told to."""

    queue: Queue
    room: Room
    now: float = 0.0
    running: list[Ticket] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)

    def come(self, one: Ticket) -> None:
        one.came = self.now
        if self.queue.offer(one, self.room, self.now):
            self.running.append(one)
        else:
            self.queue.wait(one, self.now)
            self.waiting.append(one)
            self.go()

    def go(self) -> list[Ticket]:
        gone = []
        while (one := self.queue.take(self.room, self.now)) is not None:
            self.waiting.remove(one)
            self.running.append(one)
            gone.append(one)
        return gone

    def finish(self, index: int = 0) -> list[Ticket]:
        """One that runs is done; those that go in its place."""
        self.queue.leave(self.running.pop(index), self.now)
        return self.go()

    def check(self) -> None:
        """What the queue counts is what there is."""
        queue = self.queue
        assert queue.waiting == len(self.waiting)
        assert queue.running == len(self.running)
        assert queue.reading == sum(one.reading for one in self.running)
        reading = sum(line.reading_tokens for line in queue.lines.values())
        assert reading == sum(one.tokens for one in self.running if one.reading)
        assert queue.running <= max(self.room.places, 1)
        for name, line in queue.lines.items():
            own = [one for one in self.waiting if one.tier == name]
            assert line.waiting == len(own)
            assert line.running == sum(one.tier == name for one in self.running)
            assert line.promised + line.others == pytest.approx(sum(one.price for one in own))
            assert set(line.heaps) == {one.tenant for one in own}


def world(places: int = 1, tiers: dict[str, Tier] | None = None, **room: float) -> World:
    return World(Queue(tiers or TIERS), Room(places, **{"prompts": 10**6, **room}))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_nothing_is_lost_or_counted_twice(data: st.DataObject) -> None:
    """Arrivals, first tokens, ends, drop-outs and time in any order; at the end it is empty."""
    places = data.draw(st.integers(1, 20))
    here = world(
        places, prompts=data.draw(st.integers(1, 4)), tokens=data.draw(st.integers(0, 500))
    )
    for _ in range(data.draw(st.integers(1, 40))):
        here.now += data.draw(st.sampled_from((0.0, 0.01, 1.0, 31.0)))
        what = data.draw(st.sampled_from(("come", "come", "begin", "finish", "drop")))
        if what == "come":
            due = data.draw(st.sampled_from((math.inf, here.now + 0.5, here.now + 2)))
            here.come(
                ticket(
                    data.draw(st.sampled_from(NAMES)),
                    data.draw(st.sampled_from("abc")),
                    due=due,
                    tokens=data.draw(st.integers(0, 400)),
                    streams=data.draw(st.booleans()),
                )
            )
        elif what == "begin" and here.running:
            here.queue.begin(data.draw(st.sampled_from(here.running)))
            here.go()
        elif what == "finish" and here.running:
            here.finish(data.draw(st.integers(0, len(here.running) - 1)))
        elif what == "drop" and here.waiting:
            gone = here.waiting.pop(data.draw(st.integers(0, len(here.waiting) - 1)))
            here.queue.drop(gone)
            here.go()
        here.check()
    while here.running:
        here.finish()
        here.check()
    assert not here.waiting


def test_the_higher_tier_goes_first_and_within_one_who_is_due() -> None:
    here = world()
    here.come(ticket())
    for tier, due in (
        ("batch", math.inf),
        ("standard", 9.0),
        ("standard", 5.0),
        ("interactive", 7),
    ):
        here.come(ticket(tier, due=due))
    order = []
    while here.running:
        order += [(one.tier, one.due) for one in here.finish()]
    assert order == [
        ("interactive", 7), ("standard", 5), ("standard", 9), ("batch", math.inf),
    ]  # fmt: skip


def test_who_is_late_already_lets_others_be_in_time() -> None:
    """Earliest-deadline-first under overload would make everybody late in turn."""
    here = world()
    here.come(ticket())
    for due in (1.0, 2.0, 10.0):
        here.come(ticket(due=due))
    here.now = 3.0
    late, later = here.waiting[0], here.waiting[1]
    assert here.finish()[0] not in (late, later)
    assert here.finish() == [late]
    assert here.finish() == [later]


def test_batch_gets_its_reserved_share_of_turns_while_others_would_take_all() -> None:
    """5 % of the work, in any order of arrival, and no more than that."""
    here = world()
    for _ in range(400):
        here.come(ticket("interactive"))
        here.come(ticket("batch"))
    order = []
    while len(order) < 400:
        order += [one.tier for one in here.finish()]
    assert order.count("batch") == pytest.approx(0.05 * 400, abs=2)


def test_reserved_places_are_kept_until_their_tier_has_been_idle_for_a_minute() -> None:
    here = world(places=20)  # interactive keeps 2, batch 1
    here.queue.lines["interactive"].asked_at = 0.0
    for _ in range(30):
        here.come(ticket("standard"))
    assert len(here.running) == 18
    here.come(ticket("interactive"))
    here.come(ticket("interactive"))
    assert len(here.running) == 20
    assert [one.tier for one in here.running[-2:]] == ["interactive"] * 2
    here.now = 61.0
    while urgent := [one for one in here.running if one.tier == "interactive"]:
        here.finish(here.running.index(urgent[0]))
    assert len(here.running) == 20


def test_a_long_prompt_of_a_lower_tier_is_in_nobodys_way() -> None:
    """Where replicas read by priority; where they do not, it counts for everybody."""
    for ordered in (True, False):
        here = World(Queue(TIERS), Room(9, prompts=1, tokens=500, ordered=ordered))
        here.come(ticket("standard", tokens=3000))
        here.come(ticket("interactive", tokens=600))
        here.come(ticket("standard", tokens=600))
        assert [one.tier for one in here.running] == ["standard", "interactive"][: 1 + ordered]
        here.queue.begin(here.running[0])
        assert [one.tier for one in here.go()] == [] if ordered else ["interactive"]


def test_whoever_has_waited_longest_gets_every_twentieth_turn_after_half_a_minute() -> None:
    """So that no tier without a share starves, however much comes above it."""
    here = world()
    here.come(ticket("interactive"))
    here.come(ticket("relaxed"))
    oldest = here.waiting[0]
    turns = 0
    here.now = AGED_S + 1
    while oldest.waiting:
        here.come(ticket("interactive"))
        turns += len(here.finish())
        assert turns <= AGED_TURN + 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), min_size=4, max_size=120),
    st.integers(1, 8),
    st.tuples(st.sampled_from((1.0, 2.0)), st.sampled_from((1.0, 2.0))),
    st.randoms(use_true_random=False),
)
def test_the_service_gap_of_two_that_always_wait_is_within_the_bound(
    sizes: Sequence[tuple[int, int]],
    places: int,
    weights: tuple[float, float],
    rng: random.Random,
) -> None:
    """Theorem 4.4 of the paper: at most 2 max(w_p L_in, w_q M) between any two backlogged tenants,
    M being all tokens that can be under way at once. How long an answer becomes is known only
    afterwards."""
    here = world(places)
    served = {"a": 0.0, "b": 0.0}
    real: dict[int, int] = {}
    weight = dict(zip("ab", weights, strict=True))
    number = 0

    def come(tenant: str) -> None:
        nonlocal number
        tokens, answer = sizes[number % len(sizes)]
        number += 1
        one = ticket(tenant=tenant, tokens=tokens, answer_tokens=150, weight=weight[tenant])
        real[id(one)] = answer
        here.come(one)
        kept.append(one)

    kept: list[Ticket] = []
    for _ in range(places):
        come("a")  # what fills the places before both wait is no part of it
    before = set(map(id, here.running))
    for _ in range(8):
        come("a")
        come("b")
    longest = max(size[0] for size in sizes)
    under_way = places * max(size[0] + max(size[1], 150) for size in sizes)
    bound = 2 * max(price(longest, 0), price(0, under_way)) / min(weights)
    for _ in range(150):
        index = rng.randrange(len(here.running))
        done = here.running.pop(index)
        here.queue.leave(done, here.now, real[id(done)])
        if id(done) not in before:
            served[done.tenant] += price(0, real[id(done)]) / done.weight
        for one in here.go():
            served[one.tenant] += price(one.tokens, 0) / one.weight
            come(one.tenant)
        assert abs(served["a"] - served["b"]) <= bound


def test_a_tenant_that_comes_back_is_owed_nothing() -> None:
    counters = Counters()
    counters.join("busy", ())
    counters.charge("busy", 1000, 1.0)
    counters.join("idle", ["busy"])
    assert counters.served == {"busy": 1000, "idle": 1000}


@given(
    counts=st.lists(st.integers(0, 3000), min_size=4, max_size=4),
    rate=st.floats(1, 1e6),
    more=st.integers(0, 500),
)
def test_shedding_grows_with_saturation_and_from_the_bottom(
    counts: list[int], rate: float, more: int
) -> None:
    """A tier is never shed with less chance than one above it, nor with less when more waits."""

    def chances(extra: int) -> list[float]:
        queue = Queue(TIERS)
        queue.rate = rate
        for line, count in zip(queue.lines.values(), counts, strict=True):
            line.waiting = count + extra
            line.promised = 100.0 * (count + extra)
        return [
            queue.shed_chance(name, tier.ttft_ms / 1000 if tier.ttft_ms else PATIENT_S)
            for name, tier in TIERS.items()
        ]

    found = chances(0)
    assert all(0 <= chance <= 1 for chance in found)
    assert found == sorted(found)
    assert all(then >= now for now, then in zip(found, chances(more), strict=True))


def test_an_empty_queue_sheds_nobody_and_a_full_one_everybody() -> None:
    queue = Queue({"standard": Tier(queue_max=1), "none": Tier(queue_max=0)})
    assert queue.shed_chance("standard", 2.0) == 0.0
    assert queue.shed_chance("none", 2.0) == 1.0
    queue.wait(ticket(), 0.0)
    assert queue.shed_chance("standard", 2.0) == 1.0
