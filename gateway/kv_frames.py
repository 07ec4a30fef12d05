"""KV-cache events off the wire: what vLLM, SGLang and our own runtime put into frames, in one form.

Knows MessagePack and every shape that these events have had (batches and events as arrays or maps,
tags as words or numbers, hashes as integers or bytes); knows no sockets, and nothing of what events
mean. What it is given may be anything: it answers with Junk, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from cache.prefix_index import POOL

NAME_BYTES_MAX = 128
# Of a block, as its engine calls it.
Name = int | Annotated[bytes, Meta(max_length=NAME_BYTES_MAX)]

HOST, STORE = "CPU", "STORAGE"  # beside the pool
EVENTS_MAX = 2**18  # in a batch: a snapshot of a large pool has one for each chain
BLOCKS_MAX = 2**20  # in an event
EXTRAS_BYTES_MAX = 2**22
BLOCK_SIZE_MAX = 2**14
_TAGS: dict[str | int, str] = {0: "BlockStored", 1: "BlockRemoved", 2: "AllBlocksCleared"}
# Groups whose blocks stay where they are; those of sliding windows vanish behind the window.
_STAYING = ("full", "mla")


class Junk(Exception):
    """Bytes that are no batch of KV-cache events; says where they differ."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks of one chain; `tokens` is empty where only their names are told."""

    names: Sequence[Name]
    parent: Name | None
    tokens: Sequence[int]
    block_size: int
    medium: str
    lora: str | None
    extras: Sequence[Any] | None
    group: int | None
    stays: bool  # of a group that keeps all blocks of a prompt


@dataclass(frozen=True, slots=True)
class Removed:
    """One copy of each of these is gone; `left` counts those that remain, where that is told."""

    names: Sequence[Name]
    medium: str
    group: int | None
    left: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing is left in any medium."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Batch:
    """`at` in seconds since 1970 by the publisher's clock."""

    at: float
    raw: Sequence[Raw]

    def events(self) -> Iterator[Event]:
        """One after another, so that a long batch can be taken in pieces. Raises Junk."""
        for raw in self.raw:
            if (event := _event(memoryview(raw))) is not None:
                yield event

    def clears(self) -> bool:
        """Whether nothing before it matters: it begins with a clearing. Raises Junk."""
        return isinstance(next(self.events(), None), Cleared)


def read_batch(payload: bytes) -> Batch:
    """Raises Junk; the events inside are looked at when they are asked for."""
    try:
        decoder = _BATCH_MAP if _is_map(payload) else _BATCH_ARRAY
        batch = decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Junk(f"not a batch: {error}") from None
    return Batch(batch.ts, batch.events)


def read_number(frame: bytes) -> int:
    """A batch's number; -1 ends a replay. Raises Junk."""
    if len(frame) != 8:
        raise Junk(f"a batch's number has {len(frame)} bytes instead of 8")
    return int.from_bytes(frame, "big", signed=True)


def number_and_payload(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """Of a message in either framing: its last two frames. Raises Junk."""
    if len(frames) < 2:
        raise Junk(f"a message of {len(frames)} frames")
    return read_number(frames[-2]), frames[-1]


# ---- shapes ------------------------------------------------------------------------------------

_NONE = Raw()
_Names = Annotated[list[Name], Meta(max_length=BLOCKS_MAX)]
_Ids = list[Annotated[int, Meta(ge=0, lt=2**32)]]


class _BatchArray(Struct, array_like=True, gc=False):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]


class _BatchMap(Struct, gc=False):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]


class _Tag(Struct, array_like=True, gc=False):
    type: str | int


class _Map(Struct, gc=False):
    """Any event as a map: order says nothing, what is left out is as if it were null."""

    type: str | int
    block_hashes: _Names = msgspec.field(default_factory=list)
    parent_block_hash: Name | None = None
    token_ids: _Ids = msgspec.field(default_factory=list)
    block_size: int = 0
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Raw = _NONE
    group_idx: int | None = None
    kv_cache_spec_kind: Any = None
    remaining_copy_counts: list[int] | None = None


class _StoredArray(Struct, array_like=True, gc=False):
    """Behind `medium` engines differ: what is not of the type that vLLM has there is left out."""

    type: Raw
    block_hashes: _Names
    parent_block_hash: Name | None
    token_ids: _Ids
    block_size: int
    lora_id: Raw = _NONE
    medium: str | None = None
    lora_name: Any = None
    extra_keys: Raw = _NONE
    group_idx: Any = None
    kv_cache_spec_kind: Any = None


class _RemovedArray(Struct, array_like=True, gc=False):
    type: Raw
    block_hashes: _Names
    medium: str | None = None
    group_idx: Any = None
    remaining_copy_counts: Any = None


_BATCH_ARRAY = msgspec.msgpack.Decoder(_BatchArray)
_BATCH_MAP = msgspec.msgpack.Decoder(_BatchMap)
_TAG = msgspec.msgpack.Decoder(_Tag)
_MAP = msgspec.msgpack.Decoder(_Map)
_STORED = msgspec.msgpack.Decoder(_StoredArray)
_REMOVED = msgspec.msgpack.Decoder(_RemovedArray)
_EXTRAS = msgspec.msgpack.Decoder(list[Any])


def _is_map(data: bytes | memoryview) -> bool:
    return bool(data) and (0x80 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF))


def _event(raw: memoryview) -> Event | None:
    """None for a kind of event that is not known: there may be new ones."""
    try:
        told: _Map | _Tag = (_MAP if _is_map(raw) else _TAG).decode(raw)
        match _TAGS.get(told.type, told.type):
            case "BlockStored":
                return _stored(told if isinstance(told, _Map) else _STORED.decode(raw))
            case "BlockRemoved":
                return _removed(told if isinstance(told, _Map) else _REMOVED.decode(raw))
            case "AllBlocksCleared":
                return Cleared()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Junk(f"not an event: {error}") from None
    return None


def _stored(event: _Map | _StoredArray) -> Stored:
    names, tokens, size = event.block_hashes, event.token_ids, event.block_size
    if tokens and not (1 <= size <= BLOCK_SIZE_MAX and len(tokens) == size * len(names)):
        raise Junk(f"{len(names)} blocks of {size} tokens have {len(tokens)} tokens")
    kind = event.kv_cache_spec_kind
    return Stored(
        names,
        event.parent_block_hash,
        tokens,
        size,
        _medium(event.medium),
        event.lora_name if isinstance(event.lora_name, str) else None,
        _extras(event.extra_keys, len(names)),
        _group(event),
        stays=not isinstance(kind, str) or any(word in kind for word in _STAYING),
    )


def _removed(event: _Map | _RemovedArray) -> Removed:
    names, told = event.block_hashes, event.remaining_copy_counts
    left = told if isinstance(told, list) and all(isinstance(one, int) for one in told) else None
    if left is not None and len(left) != len(names):
        raise Junk(f"{len(names)} blocks are removed and copies of {len(left)} are left")
    return Removed(names, _medium(event.medium), _group(event), left)


def _group(event: _Map | _StoredArray | _RemovedArray) -> int | None:
    return event.group_idx if isinstance(event.group_idx, int) else None


def _extras(raw: Raw, blocks: int) -> list[Any] | None:
    """What else than tokens tells blocks apart, for each; None where nothing does."""
    data = memoryview(raw)
    if len(data) > EXTRAS_BYTES_MAX:
        raise Junk(f"{len(data)} bytes of extra keys")
    if not data or not (0x90 <= data[0] <= 0x9F or data[0] in (0xDC, 0xDD)):
        return None  # null, or another engine's field at this place of an array
    found: list[Any] = _EXTRAS.decode(data)
    if not any(found):
        return None
    if len(found) != blocks:
        raise Junk(f"{blocks} blocks have extra keys for {len(found)}")
    return found


def _medium(name: str | None) -> str:
    """SGLang says CPU_PINNED, DISK and EXTERNAL; nothing means the pool."""
    if name is None or name.upper() == POOL:
        return POOL
    return HOST if name.upper().startswith(HOST) else STORE
