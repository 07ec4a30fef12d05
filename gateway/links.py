"""What is known of prompts' beginnings, piece by piece: of one that has grown only what is new is
computed. Knows bytes of ids, and nobody who makes them of a text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from cache.blocks import BLOCK_BYTES, chain_bytes

_LINK_BYTES, _HASH_BYTES = 400, 72  # what they take in memory, by sys.getsizeof


@dataclass(slots=True)
class Link:
    """A prompt's beginning up to the end of one piece."""

    size_bytes: int  # from the prompt's beginning on
    hashes: tuple[bytes, ...]  # of the blocks that end in this piece
    parent: bytes  # the last block's hash, of this piece or before
    rest: bytes  # behind that block


Encode = Callable[[bytes], bytes]


def _size_bytes(link: Link) -> int:
    return _LINK_BYTES + _HASH_BYTES * len(link.hashes)


def keys_of(stem: bytes, pieces: Iterable[bytes]) -> list[bytes]:
    """One key a piece, each over all that came before: a prompt's beginning, by its text."""
    key, keys = stem, []
    for piece in pieces:
        key = blake2b(key + piece, digest_size=16).digest()
        keys.append(key)
    return keys


def extend(last: Link, pieces: Iterable[bytes], encode: Encode) -> list[Link]:
    """The links of further pieces behind one; in any thread."""
    links = []
    for piece in pieces:
        added = encode(piece)
        data = last.rest + added
        hashes = chain_bytes(last.parent, data)
        rest = data[len(hashes) * BLOCK_BYTES :]
        parent = hashes[-1] if hashes else last.parent
        last = Link(last.size_bytes + len(added), tuple(hashes), parent, rest)
        links.append(last)
    return links


class Memory:
    """Links by their keys, as many as there is room for; the longest unused ones go first."""

    def __init__(self, limit_bytes: int) -> None:
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._links: OrderedDict[bytes, Link] = OrderedDict()

    def follow(self, keys: Sequence[bytes]) -> list[Link]:
        """The links of the first keys, as far as all are known."""
        found = []
        for key in keys:
            link = self._links.get(key)
            if link is None:
                break
            found.append(link)
        return found

    def keep(self, keys: Sequence[bytes], links: Sequence[Link]) -> None:
        """A prompt's links, known ones too; its end will go before its beginning."""
        for at in reversed(range(len(keys))):
            if keys[at] in self._links:
                self._links.move_to_end(keys[at])
            else:
                self._links[keys[at]] = links[at]
                self.size_bytes += _size_bytes(links[at])
        while self.size_bytes > self._limit_bytes:
            _, link = self._links.popitem(last=False)
            self.size_bytes -= _size_bytes(link)
