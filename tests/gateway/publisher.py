"""A model of an engine that tells of its KV cache, in any of the encodings that there have been.

Knows nothing of our code but the chain hash that its truth is told in.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cache.blocks import BLOCK_TOKENS, chain_hashes, root_hash

Name = int | bytes
Path = tuple[int, ...]  # the tokens of a prompt up to the end of a block
TAGS = {"BlockStored": 0, "BlockRemoved": 1, "AllBlocksCleared": 2}
ORDER = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind",
)  # fmt: skip
REMOVED_ORDER = ("block_hashes", "medium", "group_idx")


def root(adapter: str | None, salt: str | None) -> bytes:
    return root_hash(model="m", adapter=adapter, salt=salt)


@dataclass(frozen=True)
class Style:
    """How one engine encodes. `counted`: it tells how many copies a removed block still has."""

    maps: bool = True
    number_tags: bool = False
    batch_map: bool = False
    names: str = "int"
    block_size: int = 16
    short: bool = False  # an older array, that ends behind `medium`
    counted: bool = False

    def batch(self, at: float, events: list[dict[str, Any]]) -> bytes:
        encoded = [self.event(event) for event in events]
        whole = {"ts": at, "events": encoded, "data_parallel_rank": None}
        return msgspec.msgpack.encode(whole if self.batch_map else list(whole.values()))

    def event(self, event: dict[str, Any]) -> Any:
        kind = event["type"]
        tag = TAGS[kind] if self.number_tags else kind
        if self.maps:
            rest = {name: one for name, one in event.items() if one is not None}
            return rest | {"type": tag}
        order = {"BlockStored": ORDER, "BlockRemoved": REMOVED_ORDER}.get(kind, ())
        values = [event.get(name) for name in order]
        return [tag, *(values[:6] if self.short and kind == "BlockStored" else values)]


@dataclass
class Publisher:
    """Blocks as a multiset by medium, what was published, and what of it can be replayed."""

    style: Style = Style()
    buffer: int = 10**6  # batches that can be replayed
    snapshots: bool = False  # as our runtime: what has left the buffer comes as one batch
    life: int = 0
    at: float = 1.0
    number: int = 0
    held: dict[str, Counter[Path]] = field(default_factory=dict)
    sent: deque[tuple[int, bytes]] = field(default_factory=deque)
    truths: dict[tuple[int, int], dict[str, set[bytes]]] = field(default_factory=dict)
    kept: dict[tuple[int, int], dict[str, Counter[Path]]] = field(default_factory=dict)
    outbox: deque[tuple[int, bytes]] = field(default_factory=deque)
    _events: list[dict[str, Any]] = field(default_factory=list)

    # ---- what the engine does --------------------------------------------------------------------

    def store(self, tokens: Path, medium: str = "GPU", *, named_only: bool = False) -> None:
        """All blocks of a prompt that are not there; their names alone when `named_only`."""
        size, held = self.style.block_size, self.held.setdefault(medium, Counter())
        paths = [tokens[:end] for end in range(size, len(tokens) + 1, size)]
        known = 0
        while known < len(paths) and held[paths[known]]:
            known += 1
        self._tell_stored(paths[known:], medium, named_only=named_only)

    def copy(self, tokens: Path) -> None:
        """A second copy of the last block of a prompt, computed at the same time by another."""
        size = self.style.block_size
        if held := self.held.get("GPU"):
            path = tokens[: len(tokens) // size * size]
            if path and held[path]:
                self._tell_stored([path], "GPU", named_only=False)

    def _tell_stored(self, paths: list[Path], medium: str, *, named_only: bool) -> None:
        if not paths:
            return
        size, first = self.style.block_size, paths[0][: -self.style.block_size]
        tokens = [token for path in paths for token in path[-size:]]
        self.held[medium].update(paths)
        self._events.append(
            {
                "type": "BlockStored",
                "block_hashes": [self.name(path) for path in paths],
                "parent_block_hash": self.name(first) if first else None,
                "token_ids": [] if named_only else tokens,
                "block_size": 0 if named_only else size,
                "lora_id": None,
                "medium": medium,
                "lora_name": None,
                "extra_keys": [None] * len(paths),
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )

    def evict(self, pick: int, medium: str = "GPU") -> None:
        """One copy of a block that no other follows."""
        held, size = self.held.setdefault(medium, Counter()), self.style.block_size
        inner = {path[:-size] for path in held}
        leaves = sorted(path for path in held if path not in inner)
        if not leaves:
            return
        path = leaves[pick % len(leaves)]
        held[path] -= 1
        event = {
            "type": "BlockRemoved",
            "block_hashes": [self.name(path)],
            "medium": medium,
            "group_idx": 0,
            "remaining_copy_counts": [held[path]] if self.style.counted else None,
        }
        self._events.append(event)
        self.held[medium] = +held

    def clear(self) -> None:
        self.held.clear()
        self._events.append({"type": "AllBlocksCleared"})

    def step(self) -> None:
        """Publishes what has changed."""
        if not self._events:
            return
        self.at += 1.0
        batch = (self.number, self.style.batch(self.at, self._events))
        self._events = []
        self.truths[self.life, self.number] = self.truth()
        self.number += 1
        self.sent.append(batch)
        self.outbox.append(batch)
        if len(self.sent) > self.buffer:
            self.sent.popleft()

    def restart(self) -> None:
        self.at += 1.0
        self.life, self.number = self.life + 1, 0
        self.held.clear()
        self.sent.clear()
        self.outbox.clear()
        self._events.clear()

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        oldest = self.sent[0][0] if self.sent else self.number
        found = [batch for batch in self.sent if batch[0] >= start]
        if self.snapshots and start < oldest:
            return [(oldest - 1, self._snapshot(oldest - 1)), *found]
        return found

    def _snapshot(self, number: int) -> bytes:
        """All that was held by then, which this model takes from what it holds of the truth."""
        events, self._events = self._events, []
        now, self.held = self.held, {}
        self._events.append({"type": "AllBlocksCleared"})
        for medium, paths in self.kept[self.life, number].items():
            self.held[medium] = Counter()
            for path, copies in sorted(paths.items()):
                for _ in range(copies):
                    self._tell_stored([path], medium, named_only=False)
        payload = self.style.batch(self.at, self._events)
        self._events, self.held = events, now
        return payload

    # ---- what is true ----------------------------------------------------------------------------

    def name(self, path: Path) -> Name:
        whole = root_hash(model=repr((self.life, path)))
        return whole if self.style.names == "bytes" else int.from_bytes(whole[:8], "big")

    def truth(self) -> dict[str, set[bytes]]:
        """Our names of what is held: blocks of ours that end in a block of the engine's."""
        self.kept[self.life, self.number] = {one: Counter(held) for one, held in self.held.items()}
        return {medium: self._ours(held) for medium, held in self.held.items()}

    def _ours(self, held: Counter[Path]) -> set[bytes]:
        found = set()
        for path in held:
            before = (len(path) - self.style.block_size) // BLOCK_TOKENS
            found.update(chain_hashes(root(None, None), path)[before:])
        return found
