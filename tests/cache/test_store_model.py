"""Any sequence of operations on a store answers as a plain model does, which forgets nothing."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cache.memory_store import MemoryStore
from cache.redis_store import RedisStore
from cache.store import Bucket, Quota, Rule, Store, Want, key
from tests.redis_server import RedisServer, needs_redis, redis_server

T = TypeVar("T")
START = 1.7e9
# Powers of two, so that both ways of adding up give the same floats.
RULES: dict[str, Rule] = {
    key("bucket", "slow"): Bucket(8, per_s=0.25),
    key("bucket", "fast"): Bucket(64, per_s=16),
    key("quota", "soon"): Quota(32, ends_at=START + 4),
    key("quota", "late"): Quota(32, ends_at=START + 1000),
}
KEYS = st.sampled_from([key("value", "a"), key("value", "b")])
AMOUNTS = st.integers(0, 80).map(float)
WANTS = st.dictionaries(st.sampled_from(sorted(RULES)), AMOUNTS, min_size=1).map(
    lambda chosen: [Want(name, RULES[name], amount) for name, amount in chosen.items()]
)
CHANGES = st.dictionaries(st.sampled_from(sorted(RULES)), st.integers(-40, 40), min_size=1).map(
    lambda chosen: [Want(name, RULES[name], float(amount)) for name, amount in chosen.items()]
)
TTL = st.sampled_from([0.5, 2.0, 100.0])
DATA = st.binary(max_size=3)
TICK_S = 0.125


class Limits:
    """Every change of a rule since the beginning, added up anew for each question."""

    def __init__(self) -> None:
        self.changes: dict[str, list[tuple[float, str, float]]] = {name: [] for name in RULES}

    def left(self, name: str, now: float) -> float:
        rule = RULES[name]
        full, per_s = rule.capacity, rule.per_s
        left, at = full, START
        for moment, what, amount in [*self.changes[name], (now, "add", 0.0)]:
            left = min(full, left + per_s * (moment - at))
            at = moment
            left = min(full, left + amount) if what == "add" else min(left, amount)
        return left

    def wait_s(self, want: Want, now: float) -> float:
        left = self.left(want.key, now)
        if isinstance(want.rule, Bucket):
            return max(0.0, min(want.amount, want.rule.capacity) - left) / want.rule.per_s
        if want.amount <= left:
            return 0.0
        return max(1.0, want.rule.ends_at - now) if want.amount <= want.rule.capacity else math.inf


class Stores(RuleBasedStateMachine):
    """One store beside the model; subclasses say which."""

    server: RedisServer | None = None

    @initialize()
    def open(self) -> None:
        self.now = START
        self.runner = asyncio.Runner()
        self.store: Store
        if self.server is None:
            self.store = MemoryStore(lambda: self.now)
        else:
            url, namespace = self.server.url, secrets.token_hex(8)
            self.store = RedisStore(url, namespace=namespace, timeout_s=10, clock=lambda: self.now)
        self.limits = Limits()
        self.values: dict[str, tuple[bytes, float]] = {}
        self.sums: dict[str, tuple[float, float]] = {}
        self.log: list[tuple[bytes, float]] = []
        self.cursor, self.read_to = "", 0
        self.board: dict[str, tuple[bytes, float]] = {}

    def teardown(self) -> None:
        self.do(self.store.aclose())
        self.runner.close()

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(operation)

    @rule(ticks=st.integers(1, 40))
    def time_passes(self, ticks: int) -> None:
        self.now += ticks * TICK_S

    @rule(wants=WANTS)
    def take(self, wants: list[Want]) -> None:
        taken = self.do(self.store.take(wants))
        waits = [self.limits.wait_s(want, self.now) for want in wants]
        assert taken.allowed == (not any(waits))
        assert taken.retry_after_s == max(waits)
        assert taken.short == tuple(index for index, wait in enumerate(waits) if wait)
        if taken.allowed:
            for want in wants:
                self.limits.changes[want.key].append((self.now, "add", -want.amount))
        assert taken.left == tuple(self.limits.left(want.key, self.now) for want in wants)

    @rule(changes=CHANGES)
    def settle(self, changes: list[Want]) -> None:
        self.do(self.store.settle(changes))
        for change in changes:
            self.limits.changes[change.key].append((self.now, "add", change.amount))

    @rule(left=CHANGES)
    def restore(self, left: list[Want]) -> None:
        self.do(self.store.restore(left))
        for want in left:
            self.limits.changes[want.key].append((self.now, "floor", want.amount))

    @rule(name=KEYS, value=DATA, ttl_s=TTL)
    def put(self, name: str, value: bytes, ttl_s: float) -> None:
        self.do(self.store.put(name, value, ttl_s))
        self.values[name] = value, self.now + ttl_s

    @rule(name=KEYS, right=st.booleans(), old=st.none() | DATA, new=st.none() | DATA, ttl_s=TTL)
    def swap(
        self, name: str, right: bool, old: bytes | None, new: bytes | None, ttl_s: float
    ) -> None:
        known = self.value(name)
        old = known if right else old
        assert self.do(self.store.swap(name, old, new, ttl_s)) == (old == known)
        if old == known:
            self.values.pop(name, None)
            if new is not None:
                self.values[name] = new, self.now + ttl_s

    @rule(name=KEYS)
    def get(self, name: str) -> None:
        assert self.do(self.store.get(name)) == self.value(name)

    def value(self, name: str) -> bytes | None:
        value, ends_at = self.values.get(name, (None, 0.0))
        return value if self.now < ends_at else None

    @rule(amount=st.integers(-5, 5), ttl_s=TTL)
    def count(self, amount: int, ttl_s: float) -> None:
        name = key("count")
        total, ends_at = self.sums.get(name, (0.0, 0.0))
        if self.now >= ends_at:
            total, ends_at = 0.0, self.now + ttl_s
        self.sums[name] = total + amount, ends_at
        assert self.do(self.store.count(name, amount, ttl_s)) == total + amount

    @rule(entries=st.lists(DATA, max_size=3), ttl_s=TTL)
    def append(self, entries: list[bytes], ttl_s: float) -> None:
        self.do(self.store.append(key("log"), entries, keep=4, ttl_s=ttl_s))
        self.log += [(entry, self.now + ttl_s) for entry in entries]

    @rule()
    def read_on(self) -> None:
        kept = self.log[max(self.read_to, len(self.log) - 4) :]
        said = self.do(self.store.read(key("log"), self.cursor, 10))
        assert list(said.entries) == [entry for entry, ends_at in kept if self.now < ends_at]
        if said.entries:
            self.cursor, self.read_to = said.cursor, len(self.log)

    @rule(owner=st.sampled_from("xyz"), note=DATA, ttl_s=st.sampled_from([0.0, 0.5, 100.0]))
    def post(self, owner: str, note: bytes, ttl_s: float) -> None:
        self.do(self.store.post(key("board"), owner, note, ttl_s))
        self.board[owner] = note, self.now + ttl_s

    @rule()
    def look(self) -> None:
        notes = {owner: note for owner, (note, ends_at) in self.board.items() if self.now < ends_at}
        assert self.do(self.store.notes(key("board"))) == notes


def check(kind: type[Stores]) -> None:
    run_state_machine_as_test(
        kind, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_memory_answers_as_the_model() -> None:
    check(Stores)


@needs_redis
def test_redis_answers_as_the_model() -> None:
    with redis_server() as running:

        class OfRedis(Stores):
            server = running

        check(OfRedis)
