"""Host memory and what lies below it: what is kept, what goes, what is brought up again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from hypothesis import given, settings, strategies as st

from cache.tiers import MemoryTier, Rate, TierCounts, Tiers

SIZE = 10
ACTIONS = ["put", "load", "wants", "promote", "release", "forget"]


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def block(number: int) -> bytes:
    return bytes([number]) * SIZE


class Cellar:
    """A lower tier that is a dictionary; it reads only while its gate is open."""

    name = "cellar"

    def __init__(self) -> None:
        self.counts = TierCounts(10**6)
        self.rate = Rate()
        self.blocks: dict[bytes, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.refuses = False

    def holds(self, one: bytes) -> bool:
        return one in self.blocks

    def keeps(self, one: bytes) -> bool:
        return one in self.blocks

    def watch(self, changed: Callable[[bytes], None]) -> None:
        raise AssertionError("nobody watches here")

    def offer(self, one: bytes, data: bytes | memoryview) -> bool:
        if not self.refuses:
            self.blocks[one] = bytes(data)
        return not self.refuses

    def touch(self, one: bytes) -> None:
        assert one in self.blocks

    def drain(self, seconds: float) -> bool:
        return True

    def read(self, wanted: Sequence[bytes]) -> Iterator[bytes | None]:
        for one in wanted:
            assert self.gate.wait(10)
            yield self.blocks.get(one)

    def forget(self, wanted: Iterable[bytes] | None) -> None:
        for one in list(self.blocks) if wanted is None else wanted:
            self.blocks.pop(one, None)

    def close(self) -> None:
        self.gate.set()


class World:
    """Tiers over a cellar, and promotions that are waited for."""

    def __init__(self, memory_blocks: int, **limits: int) -> None:
        self.cellar = Cellar()
        self.memory = MemoryTier(memory_blocks * SIZE)
        self.tiers = Tiers(self.memory, self.cellar, **limits)
        self.woken = threading.Event()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.cellar.gate.set()
        self.tiers.close()
        assert self.memory.pinned == 0
        assert self.memory.counts.bytes <= self.memory.counts.limit_bytes

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.tiers.put(key(number), block(number))

    def promote(self, *numbers: int):
        self.woken.clear()
        promotion = self.tiers.promote(keys(*numbers), lambda _: self.woken.set())
        assert promotion is not None
        return promotion

    def bring_up(self, *numbers: int):
        promotion = self.promote(*numbers)
        assert self.woken.wait(10)
        assert promotion.done
        return promotion


def test_the_least_recently_used_block_leaves_memory_and_stays_below():
    with World(2) as world:
        world.put(1, 2)
        assert world.tiers.wants(keys(1)) == [False]  # which is a use
        world.put(3)
        assert [one in world.memory for one in keys(1, 2, 3)] == [True, False, True]
        assert world.tiers.find(keys(1, 2, 3)) == (1, 3)
        assert world.memory.counts.evicted == 1


def test_a_run_ends_at_the_first_block_that_nobody_has():
    with World(4) as world:
        world.put(1, 2, 4)
        assert world.tiers.find(keys(1, 2, 3, 4)) == (2, 2)
        assert world.tiers.load(keys(1, 2, 3, 4)) == [block(1), block(2)]
        assert world.tiers.find(keys(9)) == (0, 0)


def test_a_run_that_was_loaded_goes_tail_first():
    """A tail without its head is of no use to anybody."""
    with World(3) as world:
        world.put(1, 2, 3)
        world.tiers.load(keys(1, 2, 3))
        world.put(4)
        assert [one in world.memory for one in keys(1, 2, 3)] == [True, True, False]


def test_what_is_brought_up_stays_until_it_is_released():
    """Pinned blocks are kept whatever else comes, and go when nobody needs them any more."""
    with World(2) as world:
        world.put(1, 2, 3, 4, 5)
        promotion = world.bring_up(1, 2, 3)
        assert promotion.arrived == 3
        world.put(6, 7)
        assert world.tiers.load(keys(1, 2, 3)) == [block(1), block(2), block(3)]
        world.tiers.release(promotion)
        world.tiers.release(promotion)  # once is enough, twice does no harm
        assert world.memory.counts.bytes <= 2 * SIZE


def test_a_block_that_is_gone_ends_the_run_that_is_brought_up():
    with World(1) as world:
        world.put(1, 2, 3)
        del world.cellar.blocks[key(2)]
        promotion = world.bring_up(1, 2)
        assert promotion.arrived == 1
        assert world.tiers.load(keys(1, 2)) == [block(1)]
        world.tiers.release(promotion)


def test_a_promotion_that_is_given_up_brings_nothing_more():
    with World(1) as world:
        world.put(1, 2, 3)
        world.cellar.gate.clear()
        promotion = world.promote(1, 2)
        world.tiers.release(promotion)
        world.cellar.gate.set()
        assert world.woken.wait(10)
        assert promotion.arrived == 0
        assert world.tiers.find(keys(1)) == (0, 1)


def test_only_so_much_is_brought_up_at_once_but_one_run_of_any_length():
    with World(1, staging_blocks=2) as world:
        world.put(1, 2, 3, 4)
        promotion = world.bring_up(1, 2, 3)
        assert promotion.arrived == 3
        assert world.tiers.promote(keys(4), lambda _: world.woken.set()) is None
        world.tiers.release(promotion)
        world.tiers.release(world.bring_up(4))


def test_a_memory_tier_of_no_size_only_passes_on():
    with World(0) as world:
        assert world.tiers.wants(keys(1)) == [True]
        world.put(1)
        assert world.memory.counts.bytes == 0
        assert world.tiers.wants(keys(1)) == [False]
        promotion = world.bring_up(1)
        assert world.tiers.load(keys(1)) == [block(1)]
        world.tiers.release(promotion)
        assert world.memory.counts.bytes == 0


def test_what_was_refused_below_is_offered_again_when_it_leaves_memory():
    with World(1) as world:
        world.cellar.refuses = True
        world.put(1)
        world.cellar.refuses = False
        world.put(2)
        assert world.cellar.holds(key(1))


def test_what_is_forgotten_does_not_come_back():
    """Some blocks or all, from every tier, also those that somebody waits for."""
    with World(2) as world:
        world.put(1, 2, 3)
        promotion = world.bring_up(1)
        world.tiers.forget(keys(1))
        assert world.tiers.find(keys(1)) == (0, 0)
        world.tiers.release(promotion)
        world.tiers.forget()
        assert [world.tiers.find([one]) for one in keys(2, 3)] == [(0, 0)] * 2


def test_what_is_forgotten_does_not_arrive_afterwards():
    """A block that was read before everything was forgotten is not the one that is wanted now."""
    with World(1) as world:
        world.put(1, 2, 3)
        world.cellar.gate.clear()
        promotion = world.promote(1, 2)
        world.memory.forget(None)
        world.tiers.forget(keys(9))
        world.cellar.gate.set()
        assert world.woken.wait(10)
        assert promotion.arrived == 0
        world.tiers.release(promotion)


def test_without_a_lower_tier_memory_is_all():
    tiers = Tiers(MemoryTier(2 * SIZE))
    for number in (1, 2, 3):
        tiers.put(key(number), block(number))
    assert tiers.find(keys(2, 3)) == (2, 2)
    assert tiers.find(keys(1)) == (0, 0)
    assert list(tiers.counts()) == ["host"]
    tiers.close()


def test_a_rate_follows_what_is_measured():
    rate = Rate()
    assert rate.bytes_per_s is None
    assert rate.seconds(1) == float("inf")
    rate.saw(1000, 1.0)
    assert rate.seconds(500) == 0.5
    for _ in range(50):
        rate.saw(1000, 0.1)
    assert rate.bytes_per_s is not None
    assert 9_000 < rate.bytes_per_s <= 10_000


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["put", "load", "wants", "promote", "release", "forget"]),
            st.integers(0, 5),
        )
    ),
)
def test_memory_stays_within_its_limit_and_gives_what_was_put(limit, actions):
    """Stores, loads and promotions in any order: right bytes, exact counts, no lost pin."""
    with World(limit) as world:
        promotions = []
        for action, number in actions:
            if action == "put":
                world.put(number)
            elif action == "load":
                assert world.tiers.load(keys(number)) in ([], [block(number)])
            elif action == "wants":
                world.tiers.wants(keys(number))
            elif action == "forget":
                world.tiers.forget(keys(number))
                assert world.tiers.find(keys(number)) == (0, 0)
            elif action == "promote":
                run = range(number, 6)
                promotions.append(world.bring_up(*run))
                arrived = promotions[-1].arrived
                assert (
                    world.tiers.load(keys(*run))[:arrived] == [block(one) for one in run][:arrived]
                )
            elif promotions:
                world.tiers.release(promotions.pop(number % len(promotions)))
            counts = world.memory.counts
            assert counts.bytes == counts.blocks * SIZE
            assert counts.stored - counts.evicted - counts.forgotten == counts.blocks
            assert counts.blocks <= limit + world.memory.pinned
        for promotion in promotions:
            world.tiers.release(promotion)
