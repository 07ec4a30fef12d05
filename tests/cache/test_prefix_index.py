"""Who has which block: the index against sets and lists, and what of it costs what."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from cache import prefix_index
from cache.blocks import chain_hashes, root_hash
from cache.prefix_index import Mode, PrefixIndex, TooManyBlocks

TTL_S, PLEDGE_S = 64.0, 8.0  # the clock of these tests goes in whole seconds


def chain(tokens: int, root: bytes = b"root", first: int = 0) -> list[bytes]:
    return chain_hashes(root, range(first, first + tokens))


def one(seed: int) -> bytes:
    return root_hash(model=str(seed))


@dataclass
class Plain:
    """One replica: what was sent with its time, in order; what was told, by rank and medium."""

    sent: list[tuple[bytes, float]] = field(default_factory=list)
    told: dict[tuple[int, str], set[bytes]] = field(default_factory=dict)
    mode: Mode = Mode.APPROXIMATE
    capacity: int = prefix_index.CAPACITY_BLOCKS
    most: int = prefix_index.TOLD_BLOCKS_MAX

    def ttl_s(self) -> float:
        return PLEDGE_S if self.mode is Mode.EXACT else TTL_S

    def send(self, hashes: list[bytes], now: float) -> None:
        self.expire(now)
        if not hashes:  # it takes no room, and nothing is given up for it
            return
        hashes = hashes[: self.capacity]
        rest = [entry for entry in self.sent if entry[0] not in hashes]
        self.sent = rest + [(block, now) for block in reversed(hashes)]
        if len(self.sent) > self.capacity:
            del self.sent[: len(self.sent) - self.capacity + self.capacity // 32]

    def expire(self, now: float) -> None:
        self.sent = [entry for entry in self.sent if entry[1] + self.ttl_s() > now]

    def remove(self, hashes: list[bytes], medium: str, rank: int) -> None:
        self.told.setdefault((rank, medium), set()).difference_update(hashes)
        if medium == "GPU":
            self.sent = [entry for entry in self.sent if entry[0] not in hashes]

    def demote(self, now: float, rank: int | None) -> None:
        sent = {block for block, _ in self.sent}
        pool: set[bytes] = set()
        for (one, medium), known in self.told.items():
            if medium == "GPU" and rank in (None, one):
                pool |= known
        self.sent = [(block, now) for block in pool - sent] + self.sent
        self.unlearn(rank)

    def unlearn(self, rank: int | None) -> None:
        for key in [key for key in self.told if rank in (None, key[0])]:
            del self.told[key]

    def has(self, block: bytes) -> bool:
        return any(block == entry[0] for entry in self.sent) or any(
            block in known for known in self.told.values()
        )

    def pool(self, block: bytes) -> bool:
        return any(block in known for (_, where), known in self.told.items() if where == "GPU")


def leading(hashes: list[bytes], has: Any) -> int:
    return next((at for at, block in enumerate(hashes) if not has(block)), len(hashes))


# Three prompts that share beginnings, and one that shares nothing.
FIRST = chain(16 * 6)
PROMPTS = [FIRST, FIRST[:3] + chain(48, FIRST[2], 500), FIRST[:1], chain(80, b"other", 9)]
BLOCKS = sorted({block for prompt in PROMPTS for block in prompt})

replicas = st.integers(0, 3)
prompts = st.builds(lambda prompt, end: prompt[:end], st.sampled_from(PROMPTS), st.integers(0, 6))
some = st.lists(st.sampled_from(BLOCKS), max_size=6)
where = st.tuples(st.sampled_from(["GPU", "CPU", "STORAGE"]), st.integers(0, 1))
acts = st.one_of(
    st.tuples(st.just("sent"), replicas, prompts),
    st.tuples(st.just("stored"), replicas, prompts, where),
    st.tuples(st.just("removed"), replicas, some, where),
    st.tuples(st.just("cleared"), replicas, st.sampled_from([None, 0, 1])),
    st.tuples(st.just("trust"), replicas, st.sampled_from(Mode)),
    st.tuples(st.just("demote"), replicas, st.sampled_from([None, 0, 1])),
    st.tuples(st.just("unlearn"), replicas, st.sampled_from([None, 0, 1])),
    st.tuples(st.just("forget"), replicas),
    st.tuples(st.just("size"), replicas, st.integers(1, 8)),
    st.tuples(st.just("limit"), replicas, st.integers(1, 8)),
    st.tuples(st.just("wait"), st.integers(1, 40)),
)


def act(index: PrefixIndex, plain: dict[int, Plain], now: float, what: tuple[Any, ...]) -> None:
    """The same to both."""
    name, replica, *rest = what
    if name == "forget":
        index.forget(replica)
        plain.pop(replica, None)
        return
    known = plain.setdefault(replica, Plain())
    match name:
        case "sent":
            index.match([], now)  # so that both have given up what is too old
            index.sent(replica, rest[0], now)
            known.send(rest[0], now)
        case "stored":
            index.stored(replica, rest[0], *rest[1])
            known.told.setdefault((rest[1][1], rest[1][0]), set()).update(rest[0])
        case "removed":
            index.removed(replica, rest[0], *rest[1])
            known.remove(rest[0], *rest[1])
        case "cleared":
            index.cleared(replica, rest[0])
            known.sent.clear()
            known.unlearn(rest[0])
        case "trust":
            index.trust(replica, rest[0])
            known.mode = rest[0]
        case "demote":
            index.demote(replica, now, rest[0])
            known.demote(now, rest[0])
        case "unlearn":
            index.unlearn(replica, rest[0])
            known.unlearn(rest[0])
        case "size":
            index.size(replica, rest[0])
            known.capacity = min(rest[0], known.most)
        case "limit":
            index.limit(replica, rest[0])
            known.most = rest[0]
            known.capacity = min(known.capacity, known.most)


@settings(max_examples=300, deadline=None)
@example([("sent", 0, FIRST[:2]), ("size", 0, 1), ("sent", 0, [])])
@given(st.lists(acts, max_size=60))
def test_the_index_answers_as_plain_sets_do(history: list[tuple[Any, ...]]) -> None:
    """Whatever was sent, told, removed and forgotten, in any order: the same depths, modes and
    counts; and nothing is kept for what is gone."""
    index, plain, now = PrefixIndex(ttl_s=TTL_S, pledge_s=PLEDGE_S), dict[int, Plain](), 0.0
    for what in history:
        if what[0] == "wait":
            now += what[1]
        else:
            act(index, plain, now, what)
        for known in plain.values():
            known.expire(now)
        for prompt in PROMPTS:
            depths = {name: leading(prompt, known.has) for name, known in plain.items()}
            assert index.match(prompt, now) == {name: at for name, at in depths.items() if at}
            pools = {name: leading(prompt, known.pool) for name, known in plain.items()}
            assert index.in_pool(prompt) == {name: at for name, at in pools.items() if at}
        for name, known in plain.items():
            assert index.mode(name) is known.mode
            assert index.report(name)["sent"] == len(known.sent)
            both = known.told.get((0, "CPU"), set()) | known.told.get((1, "CPU"), set())
            assert index.told(name, "CPU") == both
    for name in list(plain):
        index.forget(name)
    index.sent(99, [one(at) for at in range(200)], now)  # clears away what was forgotten
    assert len(index) == 200


def test_what_was_sent_long_ago_is_not_counted_on_and_a_teller_is_given_little_time() -> None:
    """A prompt that goes to a replica that tells of itself bridges the seconds until it has told,
    so that equal prompts in a burst find it."""
    index, prompt = PrefixIndex(), chain(64)
    index.sent("sent", prompt, 0.0)
    index.trust("tells", Mode.EXACT)
    index.sent("tells", prompt, 0.0)
    assert index.match(prompt, 1.0) == {"sent": 4, "tells": 4}
    assert index.match(prompt, prefix_index.PLEDGE_S + 1) == {"sent": 4}
    assert index.match(prompt, 2 * prefix_index.TTL_S) == {}
    assert len(index) == 0


def test_a_full_record_loses_the_ends_of_old_prompts_first() -> None:
    index, old, new = PrefixIndex(), chain(16 * 40), chain(16 * 40, b"new")
    index.size(0, 64)
    index.sent(0, old, 0.0)
    index.sent(0, new, 1.0)
    assert index.match(new, 1.0) == {0: 40}
    assert index.match(old, 1.0) == {0: 22}  # 64 - 40, less the 2 that are given up at once
    assert index.report(0)["sent"] == 62


def test_a_prompt_longer_than_a_replica_has_room_for_counts_by_its_beginning() -> None:
    index, prompt = PrefixIndex(), chain(16 * 50)
    index.size(0, 10)
    index.sent(0, prompt, 0.0)
    assert index.match(prompt, 0.0) == {0: 10}


def test_a_block_in_a_lower_tier_counts_until_its_last_medium_is_gone() -> None:
    index, prompt = PrefixIndex(), chain(32)
    index.stored(0, prompt, "GPU")
    index.stored(0, prompt, "CPU")
    index.removed(0, prompt, "GPU")
    assert (index.match(prompt, 0.0), index.in_pool(prompt)) == ({0: 2}, {})
    index.removed(0, prompt[1:], "CPU")
    assert index.match(prompt, 0.0) == {0: 1}


def test_what_one_rank_gives_up_another_still_has() -> None:
    index, prompt = PrefixIndex(), chain(32)
    index.stored(0, prompt, rank=0)
    index.stored(0, prompt, rank=1)
    index.removed(0, prompt, rank=0)
    assert index.match(prompt, 0.0) == {0: 2}
    index.cleared(0, rank=1)
    assert index.match(prompt, 0.0) == {}


def test_forgetting_costs_nothing_and_bits_are_used_again() -> None:
    """A thousand lives of a replica with a thousand blocks each leave masks of a few bits."""
    index = PrefixIndex()
    for life in range(1000):
        prompt = chain(16 * 10, first=life)
        index.stored("replica", prompt)
        index.sent("replica", prompt, 0.0)
        index.forget("replica")
        assert index.match(prompt, 0.0) == {}
    index.stored("replica", chain(160))
    assert max(index._masks.values()).bit_length() < 30
    assert len(index) < 300


def test_a_teller_without_bounds_is_stopped() -> None:
    index = PrefixIndex(told_blocks_max=10)
    index.stored(0, chain(160))
    with pytest.raises(TooManyBlocks, match="10 blocks in GPU"):
        index.stored(0, chain(16, b"one more"))


def test_a_block_takes_about_two_hundred_bytes_and_less_for_each_further_replica() -> None:
    """The figures of docs/gateway.md: tables of Python, just behind their growth at the worst."""
    counts = range(2**13, 2**15, 2**11)
    firsts, further = [], []
    for blocks in counts:
        index = PrefixIndex()
        hashes = [one(at) for at in range(blocks)]
        for replica in range(2):
            index.stored(replica, hashes)
        known = index._replicas[0].told[0, "GPU"].blocks
        table, mine = sys.getsizeof(index._masks), sys.getsizeof(known)
        firsts.append((table + mine) / blocks + sys.getsizeof(hashes[0]) + 15)
        further.append(mine / blocks)
    assert max(firsts) < 260
    assert max(further) < 90
