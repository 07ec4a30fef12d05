"""Raw frames of every engine, old and new, replayed with gaps, restarts and in wrong order; and
bytes that are no frames at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from cache.blocks import chain_hashes
from cache.prefix_index import Mode, PrefixIndex
from gateway.kv_frames import Batch, Junk, number_and_payload, read_batch
from gateway.kv_source import Broken, Source
from tests.gateway.publisher import root
from tests.gateway.recording import FRAMES

RECORDS: dict[str, dict[str, Any]] = json.loads(FRAMES.read_text())
NAMES = sorted(RECORDS)


def payloads(name: str) -> list[bytes]:
    return [bytes.fromhex(one) for one in RECORDS[name]["batches"]]


def held(name: str, medium: str) -> set[bytes]:
    """Our names of all that is held in the end."""
    found: set[bytes] = set()
    for prompt in RECORDS[name]["held"].get(medium, ()):
        stem = root(prompt.get("adapter"), prompt.get("salt"))
        found.update(chain_hashes(stem, prompt["tokens"]))
    return found


def drain(work: Iterator[None]) -> None:
    for _ in work:
        pass


def new_source() -> tuple[Source, PrefixIndex]:
    index = PrefixIndex()
    source = Source(index, "r", 0, root, replays=True, clock=lambda: 0.0)
    source.connected()
    return source, index


def replay(source: Source, batches: list[bytes]) -> None:
    """Whatever it asks for, until it asks no more."""
    while (start := source.wants) is not None:
        source.began()
        for number in range(start, len(batches)):
            drain(source.replayed(number, batches[number]))
        drain(source.replay_ended())


def check(name: str, source: Source, index: PrefixIndex) -> None:
    """What is held, no more and no less; and what no text is named by is not lost."""
    assert source.mode is Mode.EXACT
    pool = index.told("r")
    assert pool >= held(name, "GPU")
    assert len(pool - held(name, "GPU")) == RECORDS[name]["unnamed"]
    assert index.told("r", "CPU") == held(name, "CPU")


@pytest.mark.parametrize("name", NAMES)
def test_what_an_engine_told_is_what_is_known(name: str) -> None:
    source, index = new_source()
    replay(source, [])
    for number, payload in enumerate(payloads(name)):
        drain(source.live(number, payload))
    check(name, source, index)
    assert source.counts.junk == source.counts.orphans == 0


@pytest.mark.parametrize("name", NAMES)
def test_gaps_anywhere_are_filled(name: str) -> None:
    """Each single batch lost, and each pair of neighbours in the wrong order."""
    batches = payloads(name)
    for at in range(len(batches) - 1):
        source, index = new_source()
        replay(source, [])
        for number, payload in enumerate(batches):
            if number != at:
                drain(source.live(number, payload))
                replay(source, batches[: number + 1])
        check(name, source, index)
        source, index = new_source()
        replay(source, [])
        order = list(range(len(batches)))
        order[at], order[at + 1] = order[at + 1], order[at]
        for number in order:
            drain(source.live(number, batches[number]))
            replay(source, batches[: max(order[: order.index(number) + 1]) + 1])
        check(name, source, index)


def later(payload: bytes) -> bytes:
    """The same batch of another life: at a later time."""
    batch = msgspec.msgpack.decode(payload)
    if isinstance(batch, dict):
        return msgspec.msgpack.encode(batch | {"ts": batch["ts"] + 1000.0})
    return msgspec.msgpack.encode([batch[0] + 1000.0, *batch[1:]])


@pytest.mark.parametrize("name", NAMES)
def test_a_restart_anywhere_is_noticed_and_read_from_the_beginning(name: str) -> None:
    batches = payloads(name)
    again = [later(payload) for payload in batches]
    for at in range(1, len(batches) + 1):
        source, index = new_source()
        replay(source, batches[:at])
        for number, payload in enumerate(again):
            drain(source.live(number, payload))
            replay(source, again[: number + 1])
        check(name, source, index)
        assert source.counts.restarts == 1


def test_either_framing_of_replays_is_read() -> None:
    number = (7).to_bytes(8, "big")
    assert number_and_payload([b"", number, b"x"]) == (7, b"x")
    assert number_and_payload([b"", b"topic", number, b"x"]) == (7, b"x")
    assert number_and_payload([b"", b"", b"\xff" * 8, b""]) == (-1, b"")
    for frames in ([], [b"x"], [b"1234567", b""], [b"123456789", b""]):
        with pytest.raises(Junk):
            number_and_payload(frames)


def test_tags_may_be_numbers_and_kinds_may_be_new() -> None:
    """An event of a kind that is not known is left out; what is beside it is not."""
    events = [
        ["BlockMoved", [1]],
        {"type": "BlockMoved"},
        [0, [1], None, list(range(16)), 16, None],
        {"type": 1, "block_hashes": [5]},
        [2],
    ]
    batch = read_batch(msgspec.msgpack.encode([1.0, events, None]))
    kinds = [type(event).__name__ for event in batch.events()]
    assert kinds == ["Stored", "Removed", "Cleared"]


STORED = [[1, 2], None, list(range(32)), 16, None, "GPU", None]
WRONG = {
    "too few tokens": ["BlockStored", [1, 2], None, list(range(31)), 16, None],
    "no size": ["BlockStored", [1, 2], None, list(range(32)), 0, None],
    "a negative token": ["BlockStored", [1], None, [-1] * 16, 16, None],
    "a token too large": ["BlockStored", [1], None, [2**32] * 16, 16, None],
    "a name without end": ["BlockStored", [b"x" * 1000], None, [1] * 16, 16, None],
    "keys of fewer blocks": ["BlockStored", *STORED, [["a"]]],
    "counts of fewer blocks": {
        "type": "BlockRemoved",
        "block_hashes": [1, 2],
        "remaining_copy_counts": [0],
    },
    "a tag of another kind": [1.5],
    "a word": "BlockStored",
    "nothing": None,
}


@pytest.mark.parametrize("event", WRONG.values(), ids=WRONG)
def test_an_event_that_cannot_be_is_refused(event: Any) -> None:
    batch = read_batch(msgspec.msgpack.encode([1.0, [event]]))
    with pytest.raises(Junk):
        list(batch.events())


def test_what_would_need_more_memory_than_was_sent_is_refused_unread() -> None:
    """A header that announces four billion events, or blocks, allocates none of them."""
    for data in (
        b"\x92\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff",
        b"\x92\xcb" + bytes(8) + b"\x91\x92\xabBlockStored\xdd\xff\xff\xff\xff",
    ):
        with pytest.raises(Junk):
            list(read_batch(data).events())


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5)
    | st.binary(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=20,
).map(msgspec.msgpack.encode)))  # fmt: skip
def test_any_bytes_at_all_are_a_batch_or_junk(data: bytes) -> None:
    try:
        batch = read_batch(data)
        assert isinstance(batch, Batch)
        list(batch.events())
    except Junk:
        pass


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_frames_with_a_flipped_byte_never_fail(name: str, data: st.DataObject) -> None:
    """They are read, or they are junk, and the source says that it is not exact; nothing else."""
    source, _ = new_source()
    replay(source, [])
    for number, payload in enumerate(payloads(name)):
        flipped = bytearray(payload)
        at = data.draw(st.integers(0, len(flipped) - 1))
        flipped[at] ^= data.draw(st.integers(1, 255))
        try:
            drain(source.live(number, bytes(flipped)))
        except Broken:
            return
        if source.counts.junk:
            assert source.mode is not Mode.EXACT
            return
