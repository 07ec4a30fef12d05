"""Block events: vLLM's bytes, a replay that is short of nothing, subscribers of every kind."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, strategies as st
from pydantic import ValidationError

from policies.schema import KvEvents, Runtime
from runtime.event_frames import Changes, chains, encode
from runtime.event_log import History, Outbox
from runtime.events import BlockEvents, EventsRefused, endpoint_of
from runtime.kv import BlockKey
from tests.runtime.subscriber import Known, Subscriber

FREE = {"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0"}
STEP: Any = None  # a listener is told sizes and times, which events do not look at


def block(number: int, parent: int | None = None, **more: Any) -> BlockKey:
    """A key whose hash spells `number`, in more bytes than the 64 bits that leave."""
    return BlockKey(name(number), None if parent is None else name(parent), (number,) * 16, **more)


def name(number: int) -> bytes:
    return b"\xab" * 24 + number.to_bytes(8, "big")


def pack(value: Any) -> bytes:
    """MessagePack by its specification, as far as events need it."""
    match value:
        case None:
            return b"\xc0"
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case int():
            forms = [(2**8, b"\xcc", ">B"), (2**16, b"\xcd", ">H"), (2**32, b"\xce", ">I")]
            if value < 128:
                return bytes([value])
            for limit, head, form in [*forms, (2**64, b"\xcf", ">Q")]:
                if value < limit:
                    return head + struct.pack(form, value)
        case str():
            body = value.encode()
            return (
                bytes([0xA0 + len(body)]) if len(body) < 32 else b"\xd9" + bytes([len(body)])
            ) + body
        case list() | tuple():
            head = (
                bytes([0x90 + len(value)])
                if len(value) < 16
                else b"\xdc" + struct.pack(">H", len(value))
            )
            return head + b"".join(map(pack, value))
        case dict():
            assert len(value) < 16
            pairs = b"".join(pack(key) + pack(one) for key, one in value.items())
            return bytes([0x80 + len(value)]) + pairs
    raise AssertionError(value)


# ---- the bytes ----------------------------------------------------------------------------------


def test_a_batch_is_byte_for_byte_what_vllm_would_send() -> None:
    """As captured from vLLM 0.32: an array of tagged maps, fields in this order, defaults out."""
    changes = Changes()
    changes.clear()
    changes.remove([name(7), name(2**63 + 9)])
    changes.store([block(1), block(300, 1)])
    changes.store([block(2**64 - 1, 70_000, adapter="pirate", salt="tenant")])
    changes.store([block(5, adapter="pirate", salt="tenant")])
    changes.store([block(6, salt="tenant")])
    changes.part("CPU").store([block(7, 6)])
    changes.part("STORAGE").remove([name(5)])

    def stored(
        hashes: list[int],
        parent: int | None,
        extra: list[Any],
        adapter: str | None = None,
        medium: str = "GPU",
    ) -> dict[str, Any]:
        return {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": [one for one in hashes for _ in range(16)],
            "block_size": 16,
            "lora_id": None,
            "medium": medium,
            "lora_name": adapter,
            "extra_keys": extra,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }

    gone = {"block_hashes": [7, 2**63 + 9], "medium": "GPU", "group_idx": 0}
    expected = [
        {"type": "AllBlocksCleared"},
        {"type": "BlockRemoved", **gone},
        {"type": "BlockRemoved", "block_hashes": [5], "medium": "STORAGE", "group_idx": 0},
        stored([1, 300], None, [None, None]),
        stored([2**64 - 1], 70_000, [("pirate",)], "pirate"),
        stored([5], None, [("pirate", "tenant")], "pirate"),
        stored([6], None, [("tenant",)]),
        stored([7], 6, [None], medium="CPU"),
    ]
    assert encode(changes, 1789095808.25, 3) == pack([1789095808.25, expected, 3])


@given(st.lists(st.integers(0, 11), max_size=12), st.randoms())
def test_chains_have_every_block_once_and_parents_first(parents: list[int], rng: Any) -> None:
    """Whatever the shape of the forest and the order in which its blocks were stored."""
    keys = [block(at + 1, parent if parent <= at else None) for at, parent in enumerate(parents)]
    rng.shuffle(keys)
    stored = {key.hash: key for key in keys}
    seen: set[bytes] = set()
    for chain in chains(stored):
        assert chain[0].parent not in stored or chain[0].parent in seen
        assert all(child.parent == key.hash for key, child in itertools.pairwise(chain))
        assert not seen & {key.hash for key in chain}
        seen |= {key.hash for key in chain}
    assert seen == set(stored)


# ---- what is told, whatever is merged or replayed -----------------------------------------------

# A pool as events see it: each operation is possible where it happens, by `Pool` below.
OPERATIONS = st.lists(st.tuples(st.sampled_from("srrsscf"), st.integers(0, 30)), max_size=60)


class Pool:
    """Stores chains, removes tails, sometimes forgets all; tells a watcher and knows the truth."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, BlockKey] = {}
        self._numbers = itertools.count(1)
        self._gone: list[BlockKey] = []

    def change(self, operation: str, at: int, watcher: Any) -> None:
        leaves = [
            key for key in self.blocks if not any(o.parent == key for o in self.blocks.values())
        ]
        if operation == "r" and leaves:
            one = leaves[at % len(leaves)]
            self._gone.append(self.blocks.pop(one))
            watcher.removed([one])
        elif operation == "c" and at % 5 == 0:
            self.blocks.clear()
            self._gone.clear()
            watcher.cleared()
        elif operation == "s":
            key = self._again(at) or self._new(at)
            self.blocks[key.hash] = key
            watcher.stored([key])

    def _again(self, at: int) -> BlockKey | None:
        """A block that was there before, when its parent still is."""
        found = [k for k in self._gone if k.hash not in self.blocks]
        found = [k for k in found if k.parent is None or k.parent in self.blocks]
        return found[at % len(found)] if found and at % 3 == 0 else None

    def _new(self, at: int) -> BlockKey:
        number = next(self._numbers)
        parents = [None, *(int.from_bytes(one[-8:], "big") for one in self.blocks)]
        return block(number, parents[at % len(parents)])

    def names(self) -> dict[int, tuple[int, ...]]:
        return {int.from_bytes(one[-8:], "big"): key.tokens for one, key in self.blocks.items()}


class Noting:
    """A watcher that keeps the net effect."""

    def __init__(self) -> None:
        self.changes = Changes()

    def stored(self, keys: list[BlockKey]) -> None:
        self.changes.store(keys)

    def removed(self, hashes: list[bytes]) -> None:
        self.changes.remove(hashes)

    def cleared(self) -> None:
        self.changes.clear()


@given(OPERATIONS, OPERATIONS)
def test_merged_steps_have_the_same_effect_and_stay_small(first: Any, then: Any) -> None:
    """However many steps are told at once: the effect is that of all, the size that of the sets."""
    pool, noting = Pool(), Noting()
    for operation, at in first:
        pool.change(operation, at, noting)
    before, noting = dict(pool.blocks), Noting()
    for operation, at in then:
        pool.change(operation, at, noting)
    after = dict(before)
    noting.changes.apply_to(after)
    assert after == pool.blocks
    assert len(noting.changes) <= 1 + len(before) + len(pool.blocks)


@given(OPERATIONS, st.integers(1, 6), st.integers(1, 20), st.integers(0, 70))
def test_a_replay_from_anywhere_ends_at_the_truth(
    operations: Any, batches_max: int, blocks_max: int, start: int
) -> None:
    """With any buffer: what is older comes as a snapshot, and no block comes before its parent."""
    pool, history = Pool(), History(0, batches_max, blocks_max)
    truth = [pool.names()]
    subscriber = Known()
    for at, (operation, choice) in enumerate(operations):
        noting = Noting()
        pool.change(operation, choice, noting)
        seq, payload = history.add(noting.changes, float(at))
        assert seq == at
        if seq < start:
            subscriber.take(seq, payload)
        truth.append(pool.names())
    for seq, payload in history.since(start):
        assert (
            seq >= start - 1
            or seq == history.next_seq - min(batches_max, len(operations)) - 1
            or blocks_max
        )
        subscriber.take(seq, payload, replayed=True)
        known = {one: entry["tokens"] for one, entry in subscriber.blocks.items()}
        assert known == truth[seq + 1]
    assert {one: entry["tokens"] for one, entry in subscriber.blocks.items()} == pool.names()
    assert subscriber.orphans == 0
    assert len(history.since(0)) <= batches_max + 1


# ---- over sockets -------------------------------------------------------------------------------


@contextmanager
def publishing(rank: int = 0, **settings: Any) -> Iterator[BlockEvents]:
    with closing(BlockEvents(KvEvents(**(FREE | settings)), rank)) as events:
        yield events


def store(events: BlockEvents, *keys: BlockKey) -> None:
    events.stored(keys)
    events.stepped(STEP)


def subscriber(events: BlockEvents, **more: Any) -> Subscriber:
    return Subscriber(events.endpoint, events.replay_endpoint, **more)


def test_who_joins_late_replays_to_the_full_state_and_then_listens() -> None:
    """Frames live and replayed are [topic, number, payload]; numbers begin at 0."""
    with publishing(topic="kv@pod@tiny") as events:
        for number in range(1, 6):
            store(events, block(number, number - 1 or None))
        events.removed([name(5)])
        events.stepped(STEP)
        with subscriber(events, topic="kv@") as late:
            found = late.replay(0)
            assert [seq for _, seq, _ in found] == [0, 1, 2, 3, 4, 5]
            assert {topic for topic, _, _ in found} == {b"kv@pod@tiny"}
            late.catch_up()
            assert list(late.known.blocks) == [1, 2, 3, 4]
            store(events, block(9, 4))
            late.listen(6)
            topic, _, _ = until_it_hears(events, late)
            assert topic == b"kv@pod@tiny"
            assert list(late.known.blocks) == [1, 2, 3, 4, 9]
            assert late.known.blocks[9]["parent"] == 4


def test_a_step_without_changes_is_no_batch_and_a_clear_needs_no_step() -> None:
    """Numbers count batches; clearing an idle engine is told at once."""
    with publishing() as events, subscriber(events) as other:
        events.stepped(STEP)
        events.stored([block(1)])
        events.removed([name(1)])
        events.stepped(STEP)
        assert other.replay(0) == []
        store(events, block(1), block(2, 1))
        events.cleared()
        other.catch_up()
        assert (other.known.last, other.known.blocks) == (1, {})


def test_a_gap_is_seen_and_filled() -> None:
    """Batches 3 to 5 never reached this subscriber: number 6 tells, a replay from 3 has them."""
    with publishing() as events, subscriber(events) as other:
        for number in range(1, 9):
            store(events, block(number, number - 1 or None))
        batches = other.replay(0)
        for at in (0, 1, 2, 6):
            other.known.take(*batches[at][1:])
        assert other.known.gaps == [(3, 6)]
        other.catch_up()
        assert list(other.known.blocks) == list(range(1, 9))


def until_it_hears(events: BlockEvents, one: Subscriber) -> tuple[bytes, int, bytes]:
    """The first live batch after its subscription has arrived."""
    while True:
        store(events, block(10**6))
        events.removed([name(10**6)])
        if batch := one.receive(0.05):
            return batch


def until_known(one: Subscriber, number: int) -> None:
    while number not in one.known.blocks:
        one.listen(one.known.last + 1)


def test_a_restart_begins_again_at_zero_and_is_seen() -> None:
    """A number below the last one means another engine: what was known of the old one is void."""
    with publishing() as events:
        endpoints = {"endpoint": events.endpoint, "replay_endpoint": str(events.replay_endpoint)}
        other = subscriber(events)
        for number in range(1, 501):
            store(events, block(number))
        other.listen(499)
    with other, publishing(**endpoints) as events:
        store(events, block(77))
        _, seq, _ = until_it_hears(events, other)
        assert seq < other.known.last
        other.known = Known()
        other.catch_up()
        assert set(other.known.blocks) - {10**6} == {77}


def test_a_slow_subscriber_misses_batches_and_nobody_waits_for_it() -> None:
    """Its queue of 8 overflows; a quick one beside it misses nothing; a replay makes it whole."""
    with (
        publishing(hwm=8, buffer_steps=100) as events,
        subscriber(events, hwm=1) as slow,
        subscriber(events) as quick,
    ):
        for one in (slow, quick):
            until_it_hears(events, one)
        numbers = itertools.count(1)
        while not events.counts.overflows:
            store(events, *(block(next(numbers)) for _ in range(64)))
            quick.listen(quick.known.last + 1)
        for _ in range(20):
            store(events, block(next(numbers)))
        until_known(quick, next(numbers) - 1)
        slow.listen(quick.known.last)
        assert slow.known.gaps
        assert slow.known.blocks == quick.known.blocks


def test_a_subscriber_that_is_gone_is_forgotten() -> None:
    """It leaves in mid-stream; batches go on to those that stay and to the buffer."""
    with publishing(hwm=4) as events, subscriber(events) as stays:
        with subscriber(events) as goes:
            until_it_hears(events, goes)
        for number in range(2, 200):
            store(events, block(number, number - 1))
        until_known(stays, 199)


def test_a_replay_beyond_the_buffer_begins_with_a_snapshot() -> None:
    """Two batches are kept of ten; the one before them clears and stores what was known by then."""
    with publishing(buffer_steps=2) as events, subscriber(events) as late:
        for number in range(1, 11):
            store(events, block(number, number - 1 or None))
        assert [seq for _, seq, _ in late.replay(0)] == [7, 8, 9]
        assert [seq for _, seq, _ in late.replay(8)] == [8, 9]
        assert late.replay(10) == late.replay(2**63) == []
        late.catch_up()
        assert list(late.known.blocks) == list(range(1, 11))
        assert late.known.orphans == 0


def test_a_long_replay_reaches_a_slow_client_and_one_that_left_costs_nothing() -> None:
    """More batches than any queue holds: all of them come, and the end; events go on beside."""
    with publishing(buffer_steps=5001) as events, subscriber(events) as slow:
        for number in range(1, 5001):
            store(events, block(number, number - 1 or None))
            if number % 500 == 0:  # the engine has models to run in between
                until_known(slow, number)
        with subscriber(events) as rude:
            rude.asker.send_multipart([b"", (0).to_bytes(8, "big")])
            assert rude.asker.poll(10_000)
        late = Subscriber(events.endpoint, None)
        with late:
            late.asker.set_hwm(1)
            late.asker.connect(str(events.replay_endpoint))
            for _ in range(2):
                late.asker.send_multipart([b"", (0).to_bytes(8, "big")])
            assert late.asker.poll(10_000)
            store(events, block(9999))
            until_known(slow, 9999)
            for _ in range(2):
                for at in range(5000):
                    assert late.asker.poll(10_000)
                    assert late.asker.recv_multipart()[2] == at.to_bytes(8, "big")
                while (frames := late.asker.recv_multipart())[2] != b"\xff" * 8:
                    assert frames[2] == (5000).to_bytes(8, "big")


def test_steps_are_merged_while_too_many_wait_and_none_is_lost() -> None:
    """The queue to the publishing thread is bounded: what does not fit is told with the next."""
    outbox = Outbox(batches_max=2)
    made = []
    for number in range(1, 6):
        outbox.changes.store([block(number)])
        made.append(outbox.flush(float(number)))
    assert made == [True, True, False, False, False]
    assert not outbox.flush(5.5)
    assert [at for _, at in outbox.take()] == [1.0, 2.0]
    assert outbox.flush(6.0)
    ((changes, at),) = outbox.take()
    assert list(changes.stored) == [name(3), name(4), name(5)]
    assert (at, outbox.merged_steps) == (6.0, 4)
    assert not outbox.flush(7.0)


@pytest.mark.parametrize(
    "request_frames", [[b"x"], [b"", b""], [b"", b"1234567"], [b"a", b"b", b"c" * 8]]
)
def test_a_replay_request_that_is_none_is_ignored(
    request_frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """And the next one, of a REQ socket or of a DEALER without the empty frame, is answered."""
    with publishing() as events, subscriber(events) as other:
        store(events, block(1))
        other.asker.send_multipart(request_frames)
        assert len(other.replay(0)) == 1
        assert "is not 8 bytes" in caplog.text
        other.asker.send((0).to_bytes(8, "big"))
        assert other.asker.poll(10_000)
        assert [len(other.asker.recv_multipart()), len(other.asker.recv_multipart())] == [3, 3]
        req = other.context.socket(zmq.REQ)
        req.connect(str(events.replay_endpoint))
        req.send((0).to_bytes(8, "big"))
        assert req.poll(10_000)
        assert req.recv_multipart()[1] == (0).to_bytes(8, "big")


# ---- where --------------------------------------------------------------------------------------


def test_each_worker_has_ports_of_its_own(tmp_path: Any) -> None:
    """Worker n takes the port n above, as in vLLM; a local socket gets the number in its name."""
    assert endpoint_of("tcp://127.0.0.1:5557", 0) == "tcp://127.0.0.1:5557"
    assert endpoint_of("tcp://[::1]:5557", 3) == "tcp://[::1]:5560"
    assert endpoint_of("ipc:///run/kv", 0) == "ipc:///run/kv"
    assert endpoint_of("ipc:///run/kv", 2) == "ipc:///run/kv_dp2"
    path = f"ipc://{tmp_path}/kv"
    with publishing(2, endpoint=path) as events, subscriber(events) as other:
        assert events.endpoint == f"{path}_dp2"
        store(events, block(1))
        other.listen(0)


@pytest.mark.parametrize(("folder", "socket"), [(0o755, 0o755), (0o777, 0o755), (0o2770, 0o660)])
def test_a_local_socket_is_open_to_the_group_that_shares_its_folder(
    tmp_path: Path, folder: int, socket: int
) -> None:
    """Events name the tokens of prompts: to nobody else, and in no other folder."""
    place = tmp_path / "s"  # a socket's path has to be short
    place.mkdir()
    place.chmod(folder)
    before = os.umask(0o022)
    try:
        with publishing(endpoint=f"ipc://{place}/kv", replay_endpoint=f"ipc://{place}/again"):
            modes = {one.name: one.stat().st_mode & 0o777 for one in place.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"kv": socket, "again": socket}


def test_a_port_that_is_taken_is_told_with_what_to_do() -> None:
    with publishing() as events, pytest.raises(EventsRefused) as caught:
        BlockEvents(KvEvents(endpoint=events.endpoint, replay_endpoint=None))
    assert events.endpoint in str(caught.value)
    assert "runtime.kv_events" in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("tcp://*:5557", "not a loopback address"),
        ("tcp://0.0.0.0:5557", "not a loopback address"),
        ("tcp://[::]:5557", "not a loopback address"),
        ("tcp://example.org:5557", "not a loopback address"),
        ("tcp://127.0.0.1", "is not an endpoint such as"),
        ("tcp://127.0.0.1:65536", "is not an endpoint such as"),
        ("udp://127.0.0.1:1", "is not an endpoint such as"),
        ("inproc://kv", "is not an endpoint such as"),
        ("ipc://", "is not an endpoint such as"),
        ("ipc://" + "x" * 97, "is not an endpoint such as"),
    ],
)
def test_events_leave_this_machine_by_no_endpoint(endpoint: str, words: str) -> None:
    """They name the tokens of prompts, and nobody has to show a key for them."""
    with pytest.raises(ValidationError, match=words):
        KvEvents(endpoint=endpoint)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (
            {"endpoint": "tcp://127.0.0.1:5557", "replay_endpoint": "tcp://127.0.0.1:5558"},
            "2 apart",
        ),
        ({"endpoint": "ipc:///a", "replay_endpoint": "ipc:///a"}, "are the same"),
        ({"endpoint": "tcp://127.0.0.1:65535"}, "beyond 65535"),
    ],
)
def test_ports_of_workers_that_would_meet_are_refused(events: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Runtime(workers=2, kv_events=KvEvents(**events))
    Runtime(workers=2, kv_events=KvEvents(**FREE))
    Runtime(workers=64, kv_events=KvEvents())
