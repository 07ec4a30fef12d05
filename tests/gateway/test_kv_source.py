"""Events in any order of things: the index has what the publisher has, or says that it may not."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from cache.blocks import chain_hashes
from cache.prefix_index import Mode, PrefixIndex
from gateway.kv_source import Broken, Source
from tests.gateway.publisher import Publisher, Style, root

PROMPTS = [
    tuple(range(96)),
    tuple(range(48)) + tuple(range(500, 548)),
    tuple(range(16)),
    tuple(range(900, 980)),
]
styles = st.builds(
    Style,
    maps=st.booleans(),
    number_tags=st.booleans(),
    batch_map=st.booleans(),
    names=st.sampled_from(["int", "bytes"]),
    block_size=st.sampled_from([16, 16, 32, 8]),
    short=st.booleans(),
)
publishers = st.builds(
    Publisher, styles, buffer=st.sampled_from([3, 10**6]), snapshots=st.booleans()
)
prompts = st.sampled_from(PROMPTS)
# What the engine does, then what the network does.
acts = st.one_of(
    st.tuples(st.just("store"), prompts),
    st.tuples(st.just("store"), prompts),
    st.tuples(st.just("copy"), prompts),
    st.tuples(st.just("offload"), prompts, st.booleans()),
    st.tuples(st.just("evict"), st.integers(0, 50), st.sampled_from(["GPU", "GPU", "CPU"])),
    st.tuples(st.just("clear")),
    st.tuples(st.just("restart"), st.booleans()),
    st.tuples(st.just("drop"), st.integers(1, 3)),
    st.tuples(st.just("again"), st.integers(1, 4)),
    st.tuples(st.just("swap")),
    st.tuples(st.just("deliver"), st.integers(1, 5)),
    st.tuples(st.just("serve")),
    st.tuples(st.just("fail")),
    st.tuples(st.just("catch up")),
    st.tuples(st.just("doubt")),
)


def drain(work: Iterator[None]) -> None:
    for _ in work:
        pass


@dataclass
class World:
    """A publisher, a wire, and a source that follows it."""

    publisher: Publisher
    replays: bool
    index: PrefixIndex = field(default_factory=PrefixIndex)
    delivered: deque[tuple[int, bytes]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        clock = count()
        self.source = Source(
            self.index, "replica", 0, root, replays=self.replays, clock=lambda: float(next(clock))
        )
        self.source.connected()

    def act(self, name: str, *more: Any) -> None:
        one = self.publisher
        match name:
            case "store":
                one.store(more[0])
            case "copy":
                one.copy(more[0])
            case "offload":
                if one.held.get("GPU", {}).get(one_block_less(more[0], one.style.block_size)):
                    one.store(more[0], "CPU", named_only=more[1])
            case "evict":
                one.evict(*more)
            case "clear":
                one.clear()
            case "restart":
                self.restart(noticed=more[0])
            case "doubt":
                self.source.doubt()
            case _:
                self.happens(name, *more)
        one.step()

    def restart(self, *, noticed: bool) -> None:
        """Noticed: the connection was lost. Else the next that is heard tells."""
        self.publisher.restart()
        self.delivered.clear()
        if noticed:
            self.source.lost()
            self.source.connected()

    def happens(self, name: str, *more: Any) -> None:
        wire = self.publisher.outbox
        match name:
            case "drop" if self.publisher.life == 0 or self.source.last >= 0:
                for _ in range(min(more[0], len(wire) - 1)):
                    wire.popleft()
            case "again" if len(self.delivered) >= more[0]:
                drain(self.source.live(*self.delivered[-more[0]]))
            case "swap" if len(wire) > 1:
                wire[0], wire[1] = wire[1], wire[0]
            case "deliver":
                for _ in range(min(more[0], len(wire))):
                    self.deliver()
            case "serve":
                self.serve()
            case "fail" if self.source.wants is not None:
                self.source.began()
                drain(self.source.replay_failed())
            case "catch up":
                self.source.catch_up()

    def deliver(self) -> None:
        batch = self.publisher.outbox.popleft()
        self.delivered.append(batch)
        drain(self.source.live(*batch))

    def serve(self) -> None:
        if (start := self.source.wants) is not None:
            self.source.began()
            for batch in self.publisher.replay(start):
                drain(self.source.replayed(*batch))
                self.check()
            drain(self.source.replay_ended())

    def settle(self) -> None:
        """Everything arrives, every replay is served."""
        while self.publisher.outbox:
            self.deliver()
        for _ in range(12):
            self.serve()
            self.source.catch_up()
        self.serve()

    def check(self) -> None:
        """What is held to be exact is the truth by the last batch."""
        if self.source.mode is Mode.EXACT and self.source.last >= 0:
            told = {one: self.index.told("replica", one) for one in ("GPU", "CPU")}
            truths = [
                {one: truth.get(one, set()) for one in ("GPU", "CPU")}
                for (_, number), truth in self.publisher.truths.items()
                if number == self.source.last
            ]
            assert told in truths, "the index is no truth that there was by this batch"


def one_block_less(tokens: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tokens[: len(tokens) // size * size]


@settings(max_examples=400, deadline=None)
@given(publishers, st.booleans(), st.lists(acts, max_size=50))
def test_the_index_equals_the_engines_truth_or_says_that_it_may_not(
    publisher: Publisher, replays: bool, history: list[tuple[Any, ...]]
) -> None:
    """Gaps, restarts seen and unseen, duplicates, swapped messages, failed replays, in every
    encoding: after every message, what is called exact is the truth by that message's number; and
    in the end, when everything has arrived, it is the truth of now."""
    world = World(publisher, replays)
    for what in history:
        world.act(*what)
        world.check()
    publisher.store(PROMPTS[3])
    publisher.evict(0)
    publisher.step()
    world.settle()
    source, truth = world.source, publisher.truth()
    if source.mode is Mode.EXACT and source.last >= 0:
        assert source.last == publisher.number - 1
        for medium in ("GPU", "CPU"):
            assert world.index.told("replica", medium) == truth.get(medium, set())
    everything = publisher.buffer > 1000 or publisher.snapshots
    if replays and everything and all(what[0] not in ("fail", "doubt") for what in history):
        assert source.mode is Mode.EXACT, "replays brought everything, and it is not believed"


@pytest.mark.parametrize("pick", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [24, 32, 48])
def test_prompts_that_part_inside_an_engines_block_share_what_is_ours_of_it(
    size: int, pick: int
) -> None:
    """Our block before the fork ends in a block of each; one is evicted, the other stays."""
    publisher = Publisher(Style(block_size=size))
    world = World(publisher, replays=False)
    for what in (("store", PROMPTS[0]), ("store", PROMPTS[1]), ("evict", pick, "GPU")):
        world.act(*what)
    world.settle()
    assert world.source.mode is Mode.EXACT
    assert world.index.told("replica", "GPU") == publisher.truth()["GPU"]


def follow(publisher: Publisher, *, replays: bool = True) -> World:
    world = World(publisher, replays)
    for prompt in PROMPTS:
        publisher.store(prompt)
        publisher.step()
    return world


def test_a_gap_is_filled_by_a_replay_while_live_batches_wait() -> None:
    world = follow(Publisher())
    world.serve()
    world.publisher.outbox.clear()
    for at in range(4):
        world.publisher.store(tuple(range(2000 + at, 2032 + at)))
        world.publisher.step()
    world.publisher.outbox.popleft()
    world.deliver()
    assert (world.source.wants, world.source.mode) == (3, Mode.DEGRADED)
    world.deliver()
    assert world.source.last == 2
    world.serve()
    world.deliver()
    assert (world.source.last, world.source.mode) == (6, Mode.EXACT)
    assert world.source.counts.gaps == 1
    assert world.source.counts.holes == 0


def test_what_no_replay_covers_leaves_it_degraded_with_what_it_knew_decaying() -> None:
    """vLLM replays only what its buffer has: the rest is known no better than what was sent."""
    world = follow(Publisher(buffer=1))
    while world.publisher.outbox:
        world.deliver()
    world.serve()
    world.serve()
    world.serve()
    assert world.source.mode is Mode.DEGRADED
    assert world.source.counts.holes == 1
    world.publisher.clear()
    world.publisher.step()
    world.settle()
    assert world.source.mode is Mode.EXACT, "whatever was missed, the engine has cleared it"


def test_without_replays_it_is_exact_from_the_first_batch_on_or_not_at_all() -> None:
    world = follow(Publisher(), replays=False)
    while world.publisher.outbox:
        world.deliver()
    assert world.source.mode is Mode.EXACT
    late = follow(Publisher(), replays=False)
    late.publisher.outbox.popleft()
    while late.publisher.outbox:
        late.deliver()
    assert late.source.mode is Mode.DEGRADED


def test_a_publisher_that_has_told_nothing_has_nothing() -> None:
    world = World(Publisher(), replays=True)
    assert world.source.mode is Mode.APPROXIMATE
    world.serve()
    assert world.source.mode is Mode.EXACT


def test_an_unanswered_replay_is_not_taken_for_an_empty_one() -> None:
    world = World(Publisher(), replays=True)
    world.source.began()
    drain(world.source.replay_failed())
    assert world.source.mode is Mode.APPROXIMATE


def test_copies_are_counted_as_vllm_counts_them() -> None:
    """Two requests that compute the same block hold it twice; one is evicted, the other stays."""
    for counted in (False, True):
        world = follow(Publisher(Style(counted=counted)))
        prompt = PROMPTS[3]
        world.publisher.copy(prompt)
        world.publisher.evict(3)
        world.publisher.evict(3)
        world.publisher.step()
        world.settle()
        assert world.index.told("replica") == world.publisher.truth()["GPU"]


def test_junk_makes_a_hole_and_a_publisher_of_nothing_else_is_left() -> None:
    world = follow(Publisher())
    world.settle()
    drain(world.source.live(3, b"\x93junk"))
    assert world.source.mode is Mode.DEGRADED
    assert world.source.counts.junk == 1
    with pytest.raises(Broken, match="not a batch"):
        for number in range(4, 40):
            drain(world.source.live(number, b"\xc1"))


def test_batches_that_find_no_room_while_a_replay_runs_are_asked_for_again() -> None:
    world = World(Publisher(), replays=True)
    batches = [(number, Style().batch(1.0 + number, [])) for number in range(5000)]
    for batch in batches:
        drain(world.source.live(*batch))
    while (start := world.source.wants) is not None:
        world.source.began()
        for batch in batches[start : start + 2500]:
            drain(world.source.replayed(*batch))
        drain(world.source.replay_ended())
    assert (world.source.last, world.source.mode) == (4999, Mode.EXACT)
    assert world.source.counts.replays == 2


def test_a_restart_behind_batches_that_only_a_replay_told_shows_by_its_time() -> None:
    """Nothing was heard live yet, so that number 0 is not lower than anything heard."""
    world = follow(Publisher())
    world.publisher.outbox.clear()
    world.serve()
    assert world.source.last == 2
    world.restart(noticed=False)
    world.publisher.store(PROMPTS[2])
    world.publisher.step()
    world.settle()
    assert world.source.counts.restarts == 1
    assert world.index.told("replica") == world.publisher.truth()["GPU"]


@pytest.mark.parametrize("medium", ["GPU", "CPU"])
def test_blocks_behind_one_that_nobody_told_of_make_a_hole(medium: str) -> None:
    """They cannot be named: their beginning is not known. Those beside them can."""
    world = World(Publisher(), replays=False)
    beside, lost = PROMPTS[3][:32], tuple(range(4000, 4032))
    world.publisher.store(beside)
    world.publisher.held.setdefault(medium, Counter())
    world.publisher._tell_stored([lost], medium, named_only=False)
    world.publisher.step()
    world.deliver()
    assert world.source.counts.orphans == 1
    assert world.source.mode is Mode.DEGRADED
    hashes = chain_hashes(root(None, None), beside)
    assert world.index.match(hashes, 0.0) == {"replica": 2}
