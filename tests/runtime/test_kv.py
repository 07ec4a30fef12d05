"""The pool gives up what was used longest ago, tails first, and tells whoever watches."""

from __future__ import annotations

import pytest

from cache.blocks import chain_hashes
from runtime.kv import BlockKey, BlockPool, OutOfBlocks


class Diary:
    """Writes down what the pool tells."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, object]] = []

    def stored(self, keys):
        self.lines.append(("stored", [key.hash for key in keys]))

    def evicting(self, blocks):
        self.lines.append(("evicting", list(blocks)))

    def removed(self, hashes):
        self.lines.append(("removed", list(hashes)))

    def cleared(self):
        self.lines.append(("cleared", None))


def keys(name: bytes, count: int) -> list[BlockKey]:
    tokens = [int.from_bytes(name, "big")] * 16 * count
    hashes = chain_hashes(b"root", tokens)
    parents = [None, *hashes]
    return [BlockKey(hashes[at], parents[at], tuple(tokens[:16])) for at in range(count)]


def store(pool: BlockPool, name: bytes, count: int) -> list[int]:
    """Blocks that were computed under a name and left again."""
    blocks = pool.take(count)
    pool.seal(blocks, keys(name, count))
    pool.give_back(blocks)
    return blocks


def test_the_longest_unused_goes_first_and_of_one_sequence_its_tail():
    """The beginning of a prompt is worth more than its end: without it the end is never found."""
    pool = BlockPool(6)
    old, new = store(pool, b"a", 3), store(pool, b"b", 3)
    assert pool.match([key.hash for key in keys(b"a", 3)]) == old
    assert pool.take(1) == [old[2]]
    assert pool.match([key.hash for key in keys(b"a", 3)]) == old[:2]
    assert pool.take(3) == [old[1], old[0], new[2]]
    pool.check()


def test_what_is_held_again_is_used_again():
    """A hit makes its blocks the most recently used ones."""
    pool = BlockPool(4)
    first, second = store(pool, b"a", 2), store(pool, b"b", 2)
    pool.hold(first)
    pool.give_back(first)
    assert pool.take(2) == second[::-1]
    pool.check()


def test_held_blocks_are_never_given_up():
    """A block that anybody holds is no one else's, however little room there is."""
    pool = BlockPool(4)
    held = store(pool, b"a", 2)
    pool.hold(held)
    pool.hold(held)
    pool.give_back(held)
    with pytest.raises(OutOfBlocks, match="asked for 3 blocks, 2 are available"):
        pool.take(3)
    assert (pool.available, pool.counts().in_use) == (2, 2)
    assert set(pool.take(2)).isdisjoint(held)
    pool.check()


def test_a_watcher_hears_of_everything_before_it_is_overwritten():
    """Stored, evicting with the block's number, removed, cleared: in the order of the changes."""
    diary = Diary()
    pool = BlockPool(2, [diary])
    (block,) = store(pool, b"a", 1)
    (key,) = keys(b"a", 1)
    pool.take(2)
    assert diary.lines == [
        ("stored", [key.hash]),
        ("evicting", [(block, key.hash)]),
        ("removed", [key.hash]),
    ]
    pool.clear()
    assert diary.lines[-1] == ("cleared", None)


def test_content_that_is_known_already_stays_private():
    """Two sequences computed the same block: one is found, the other is freed with its holder."""
    diary = Diary()
    pool = BlockPool(2, [diary])
    one, two = pool.take(1), pool.take(1)
    pool.seal(one, keys(b"a", 1))
    pool.seal(two, keys(b"a", 1))
    assert len(diary.lines) == 1
    pool.give_back(two)
    pool.give_back(one)
    counts = pool.counts()
    assert (counts.free, counts.cached, counts.in_use) == (1, 1, 0)
    pool.check()


def test_what_is_distrusted_is_found_no_more():
    """Unsealed blocks leave the index; those that nobody holds are free."""
    pool = BlockPool(3)
    blocks = store(pool, b"a", 2)
    pool.unseal(blocks[1:])
    assert pool.match([key.hash for key in keys(b"a", 2)]) == blocks[:1]
    assert pool.counts().free == 2
    pool.check()
