"""Block events as vLLM 0.32 puts them on the wire: msgpack, an array of tagged maps a step.

Knows the format (docs/events.md), so that one consumer serves both engines; knows no sockets.
Hashes are the low 64 bits of ours, as unsigned integers, which is vLLM's default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cache.blocks import BLOCK_TOKENS

if TYPE_CHECKING:
    from runtime.kv import BlockKey

# The tier that a block of the engine's own pool is in, as vLLM calls it on every device.
MEDIUM = "GPU"
GROUP = 0
SPEC_KIND = "full_attention"
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class _Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag=True):
    """One change; on the wire a map with the class's name as `type`, defaults left out."""


class BlockStored(_Event, frozen=True):
    """Consecutive blocks of one chain can be found; `token_ids` has those of all of them."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(_Event, frozen=True):
    """These blocks can no longer be found."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(_Event, frozen=True):
    """No block can be found."""


@dataclass(slots=True)
class Changes:
    """The net effect of one step or several on what can be found: cleared, then removed, then
    stored. Never larger than what could be found before and can be found now.

    What `below` says of tiers, by their medium, is cleared together with the pool.
    """

    cleared: bool = False
    removed: dict[bytes, None] = field(default_factory=dict)
    stored: dict[bytes, BlockKey] = field(default_factory=dict)
    below: dict[str, Changes] = field(default_factory=dict)

    def __len__(self) -> int:
        below = sum(map(len, self.below.values()))
        return self.cleared + len(self.removed) + len(self.stored) + below

    def part(self, medium: str) -> Changes:
        """Those of one tier below the pool."""
        return self.below.setdefault(medium, Changes())

    def parts(self) -> Iterator[tuple[str, Changes]]:
        """Those of the pool, then of each tier, with the medium."""
        yield MEDIUM, self
        yield from self.below.items()

    def store(self, keys: Iterable[BlockKey]) -> None:
        self.stored |= {key.hash: key for key in keys}

    def remove(self, hashes: Iterable[bytes]) -> None:
        for one in hashes:
            if self.stored.pop(one, None) is None:
                self.removed[one] = None

    def clear(self) -> None:
        self.cleared = True
        self.removed.clear()
        self.stored.clear()
        self.below.clear()

    def apply_to(self, blocks: dict[bytes, BlockKey]) -> None:
        """Brings a set of known blocks of one medium up to date."""
        if self.cleared:
            blocks.clear()
        for one in self.removed:
            blocks.pop(one, None)
        blocks |= self.stored


def encode(changes: Changes, at: float, rank: int) -> bytes:
    """The payload of one batch: `[at, events, rank]`; `at` in seconds since 1970."""
    # One event at a time: encoding holds the interpreter's lock, and a snapshot can be long.
    events = [msgspec.Raw(msgspec.msgpack.encode(event)) for event in _events(changes)]
    return msgspec.msgpack.encode((at, events, rank))


def sequence_number(seq: int) -> bytes:
    """A batch's number as its frame."""
    return seq.to_bytes(8, "big")


def _events(changes: Changes) -> Iterator[_Event]:
    if changes.cleared:
        yield AllBlocksCleared()
    for medium, part in changes.parts():
        if part.removed:
            yield BlockRemoved([_name(one) for one in part.removed], medium, GROUP)
    for medium, part in changes.parts():
        for chain in chains(part.stored):
            yield _stored(chain, medium)


def _stored(chain: list[BlockKey], medium: str) -> BlockStored:
    first = chain[0]
    return BlockStored(
        block_hashes=[_name(key.hash) for key in chain],
        parent_block_hash=None if first.parent is None else _name(first.parent),
        token_ids=[token for key in chain for token in key.tokens],
        block_size=BLOCK_TOKENS,
        lora_id=None,
        medium=medium,
        lora_name=first.adapter,
        extra_keys=[_extra(key) for key in chain],
        group_idx=GROUP,
        kv_cache_spec_kind=SPEC_KIND,
    )


def _extra(key: BlockKey) -> tuple[str, ...] | None:
    """What else than its tokens tells a block apart: its adapter, and in a first block its salt."""
    salt = key.salt if key.parent is None else None
    return tuple(part for part in (key.adapter, salt) if part is not None) or None


def _name(one: bytes) -> int:
    return int.from_bytes(one[-8:], "big")


def chains(keys: Mapping[bytes, BlockKey]) -> Iterator[list[BlockKey]]:
    """All keys as runs in which each is the parent of the next; parents come before children."""
    children: dict[bytes | None, list[BlockKey]] = {}
    firsts = []
    for key in keys.values():
        if key.parent in keys:
            children.setdefault(key.parent, []).append(key)
        else:
            firsts.append(key)
    firsts.reverse()
    while firsts:
        chain = [firsts.pop()]
        while behind := children.get(chain[-1].hash):
            firsts += reversed(behind[1:])
            chain.append(behind[0])
        yield chain
