"""One engine's blocks under our own names: its hashes -> the chain hashes that prompts have here.

Knows that an engine's hashes are opaque, that its blocks may be of any size, and that it may hold a
block several times; knows no frames, numbers or sockets. Tokens, adapter and salt make our name;
whatever else an engine tells blocks apart by (images, embeddings) makes one that no prompt has.

A block of ours counts as held while the engine's block in which it ends is held: engines give up
the ends of prompts first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

from cache.blocks import BLOCK_TOKENS, chain_hashes
from cache.prefix_index import POOL, PrefixIndex, TooManyBlocks
from gateway.kv_frames import Cleared, Event, Name, Removed, Stored

NAMES_MAX = 2**20  # that one source may have at a time
GONE_MAX = 2**16  # names of blocks that are gone, which others may still follow
PIECE_BLOCKS = 256  # handled at a time; then others may have a turn

# (adapter, salt) -> the parent of first blocks
Root = Callable[[str | None, str | None], bytes]


@dataclass(frozen=True, slots=True)
class Node:
    """An engine's block that is not just one of ours: our blocks that end in it, the last of ours
    before or at its end, and the tokens behind that."""

    ended: tuple[bytes, ...]
    tip: bytes
    tail: tuple[int, ...] = ()


Place = bytes | Node  # a block of ours, where the engine's is the same


class Blocks:
    """What one source (a replica, a rank of it) holds by its own events."""

    def __init__(self, index: PrefixIndex, replica: str, rank: int, root: Root) -> None:
        self._index = index
        self._replica = replica
        self._rank = rank
        self._root = root
        self._held: dict[str, dict[Name, Place]] = {POOL: {}}  # by medium
        self._more: dict[tuple[str, Name], int] = {}  # further copies
        # Of ours, by how many nodes it ends in: prompts may part inside an engine's block.
        self._ends: dict[tuple[str, bytes], int] = {}
        self._gone: dict[Name, Place] = {}
        self._passing: set[int] = set()  # groups whose blocks do not stay
        self.orphans = 0  # blocks that could not be named, since the last clearing

    def __len__(self) -> int:
        """Engine's blocks in the pool."""
        return len(self._held[POOL])

    def clear(self) -> None:
        """The engine has nothing any more."""
        self._forget()
        self._index.cleared(self._replica, self._rank)

    def restart(self) -> None:
        """Everything is about to be told again."""
        self._forget()
        self._index.unlearn(self._replica, self._rank)

    def demote(self, now: float) -> None:
        """Something was missed: what is known from here on is right, and not all."""
        self._index.demote(self._replica, now, self._rank)

    def _forget(self) -> None:
        self._held = {POOL: {}}
        self._more.clear()
        self._ends.clear()
        self._gone.clear()
        self.orphans = 0

    def take(self, event: Event) -> Iterator[None]:
        """Brings the index up to date, piece by piece. Raises TooManyBlocks."""
        match event:
            case Cleared():
                self.clear()
            case Removed():
                if event.group not in self._passing:
                    yield from self._remove(event)
            case Stored():
                if event.stays:
                    yield from self._store(event)
                elif event.group is not None:
                    self._passing.add(event.group)

    # ---- stored ----------------------------------------------------------------------------------

    def _store(self, event: Stored) -> Iterator[None]:
        place = self._before(event)
        size = event.block_size
        for at in range(0, len(event.names), PIECE_BLOCKS):
            if at:
                yield
            names = event.names[at : at + PIECE_BLOCKS]
            if not event.tokens:
                self._hold_known(names, event.medium)
                continue
            if place is None:
                self.orphans += len(names)
                continue
            tokens = event.tokens[at * size : (at + len(names)) * size]
            extras = event.extras and event.extras[at : at + PIECE_BLOCKS]
            places = self._places(
                place, tokens, size, extras, event.lora, first=_is_first(event, at)
            )
            place = places[-1]
            self._hold(names, places, event.medium)

    def _before(self, event: Stored) -> Place | None:
        """What the first of these blocks follows; None when that is not known."""
        if event.parent is not None:
            return self._find(event.parent)
        extra = event.extras[0] if event.extras else None
        return self._root(event.lora, _told_apart(extra, event.lora, first=True)[0])

    def _places(
        self,
        before: Place,
        tokens: Sequence[int],
        size: int,
        extras: Sequence[Any] | None,
        lora: str | None,
        *,
        first: bool,
    ) -> Sequence[Place]:
        if extras:
            marks = [
                _told_apart(extra, lora, first=first and at == 0)[1]
                for at, extra in enumerate(extras)
            ]
            if any(marks):
                return self._marked(before, tokens, size, marks)
        if size == BLOCK_TOKENS and isinstance(before, bytes):
            return chain_hashes(before, tokens)
        return _rechunk(before, tokens, size)

    def _marked(
        self, before: Place, tokens: Sequence[int], size: int, marks: Sequence[bytes]
    ) -> list[Place]:
        """One by one: a mark goes into the name of its block, and so of all behind it."""
        places: list[Place] = []
        for at, mark in enumerate(marks):
            if mark:
                tip, tail = _end(before)
                before = Node((), sha256(tip + repr(tail).encode() + mark).digest())
            before = _rechunk(before, tokens[at * size : (at + 1) * size], size)[0]
            places.append(before)
        return places

    def _hold(self, names: Sequence[Name], places: Sequence[Place], medium: str) -> None:
        held = self._held.setdefault(medium, {})
        if len(held) + len(names) > NAMES_MAX:
            raise TooManyBlocks(f"more than {NAMES_MAX} blocks in {medium}")
        fresh: list[bytes] = []
        for name, place in zip(names, places, strict=True):
            if name in held:
                self._more[medium, name] = self._more.get((medium, name), 0) + 1
                continue
            held[name] = place
            fresh += self._begun(place, medium)
        self._index.stored(self._replica, fresh, medium, self._rank)

    def _hold_known(self, names: Sequence[Name], medium: str) -> None:
        """Copies in a lower tier, told by name alone."""
        found = [(name, place) for name in names if (place := self._find(name)) is not None]
        self.orphans += len(names) - len(found)
        self._hold([name for name, _ in found], [place for _, place in found], medium)

    def _find(self, name: Name) -> Place | None:
        for held in self._held.values():
            if (place := held.get(name)) is not None:
                return place
        return self._gone.get(name)

    # ---- removed ---------------------------------------------------------------------------------

    def _remove(self, event: Removed) -> Iterator[None]:
        held = self._held.setdefault(event.medium, {})
        for at in range(0, len(event.names), PIECE_BLOCKS):
            if at:
                yield
            gone: list[bytes] = []
            for place_in, name in enumerate(event.names[at : at + PIECE_BLOCKS], start=at):
                if self._copies_left(event, place_in, name):
                    continue
                if (place := held.pop(name, None)) is not None:
                    self._gone[name] = place
                    gone += self._over(place, event.medium)
            self._index.removed(self._replica, gone, event.medium, self._rank)
            self._forget_gone()

    def _begun(self, place: Place, medium: str) -> Iterable[bytes]:
        """What of ours is held from now on, with this place."""
        if isinstance(place, bytes):
            return (place,)
        counts = [self._ends.get((medium, one), 0) for one in place.ended]
        for one, count in zip(place.ended, counts, strict=True):
            self._ends[medium, one] = count + 1
        return [one for one, count in zip(place.ended, counts, strict=True) if not count]

    def _over(self, place: Place, medium: str) -> Iterable[bytes]:
        """What of ours is held no longer, without this place."""
        if isinstance(place, bytes):
            return (place,)
        gone = []
        for one in place.ended:
            left = self._ends.pop((medium, one)) - 1
            if left:
                self._ends[medium, one] = left
            else:
                gone.append(one)
        return gone

    def _copies_left(self, event: Removed, at: int, name: Name) -> bool:
        """Notes one copy less; True while there is another."""
        key = (event.medium, name)
        left = self._more.pop(key, 0) if event.left is None else event.left[at]
        if left > 1:
            self._more[key] = left - 1
        elif event.left is not None:
            self._more.pop(key, None)
        return left > 0

    def _forget_gone(self) -> None:
        if len(self._gone) > GONE_MAX:
            for name in list(islice(self._gone, GONE_MAX // 4)):
                del self._gone[name]


def _is_first(event: Stored, at: int) -> bool:
    return at == 0 and event.parent is None


def _end(place: Place) -> tuple[bytes, tuple[int, ...]]:
    return (place, ()) if isinstance(place, bytes) else (place.tip, place.tail)


def _rechunk(before: Place, tokens: Sequence[int], size: int) -> list[Place]:
    """Blocks of `size` tokens as what of ours ends in each."""
    tip, tail = _end(before)
    rest = (*tail, *tokens)
    ours = chain_hashes(tip, rest)
    places: list[Place] = []
    done = 0
    for end in range(len(tail) + size, len(rest) + 1, size):
        upto = end // BLOCK_TOKENS
        last = ours[upto - 1] if upto else tip
        behind = rest[upto * BLOCK_TOKENS : end]
        if upto - done == 1 and not behind:
            places.append(last)
        else:
            places.append(Node(tuple(ours[done:upto]), last, behind))
        done = upto
    return places


def _told_apart(extra: Any, lora: str | None, *, first: bool) -> tuple[str | None, bytes]:
    """What else than tokens and adapter tells a block apart: its salt, which only the first block
    of a prompt has, and a mark of everything else. Mostly neither."""
    if not extra:
        return None, b""
    rest = [_word(one) for one in (extra if isinstance(extra, list | tuple) else [extra])]
    if lora in rest:
        rest.remove(lora)
    words = [one for one in rest if isinstance(one, str)] if first else []
    salt = words[0] if words else None
    if salt is not None:
        rest.remove(salt)
    return salt, repr(rest).encode() if rest else b""


def _word(key: Any) -> Any:
    """A typed key of an adapter or a salt is that word, as it was before keys had types."""
    if isinstance(key, dict) and len(key) == 2:
        kind = str(key.get("type", "")).lower()
        words = [one for name, one in key.items() if name != "type" and isinstance(one, str)]
        if len(words) == 1 and ("lora" in kind or "salt" in kind):
            return words[0]
    return key
