"""Which requests run in which order: blocks of rows, each asked of the arms in turn, A B B A.

Deterministic by the seed. Knows no server; what a block is made of says `Design` of the hypothesis.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from evals.item import Item
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE
from policies.hypothesis import Design, Stats

Session = tuple[Item, ...]  # asked one after another
CONTROL_BLOCKS_MIN = 12  # fewer would say nothing of times


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that an arm is asked together, before the next arm is. `number` counts in its source."""

    source: str
    number: int
    repeat: int
    sessions: tuple[Session, ...]
    begin_s: float = 0.0  # of recorded traffic: where in the recording it begins

    @property
    def items(self) -> Iterator[Item]:
        return (item for session in self.sessions for item in session)

    @property
    def size(self) -> int:
        return sum(len(session) for session in self.sessions)


@dataclass(frozen=True, slots=True)
class Step:
    """One block in one arm: what runs alone, and is written down whole."""

    block: Block
    arm: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.block.source, self.block.number, self.arm


def blocks_of_rows(
    source: str, items: Sequence[Item], design: Design, stats: Stats
) -> tuple[Block, ...]:
    """A suite's rows, shuffled, conversations whole, at most `max_pairs` of them.

    Repeats come as further blocks, each with the rows of one before it.
    """
    sessions = _sessions(items) if design.sessions else [(item,) for item in items]
    random.Random(f"{stats.seed}:{source}").shuffle(sessions)  # noqa: S311  # repeatable
    chunks = _packed(_at_most(sessions, stats.max_pairs // design.repeats), design.block_items)
    return _numbered(source, chunks, design.repeats)


def blocks_of_time(
    source: str, items: Sequence[Item], design: Design, stats: Stats
) -> tuple[Block, ...]:
    """Recorded traffic, cut every `block` seconds of the recording; the first `max_pairs`."""
    windows: dict[int, list[Session]] = {}
    for item in items[: stats.max_pairs // design.repeats]:
        windows.setdefault(int(float(item.meta["t_s"]) // design.block), []).append((item,))
    chunks = [tuple(windows[at]) for at in sorted(windows)]
    begins = [at * design.block for at in sorted(windows)] * design.repeats
    numbered = _numbered(source, chunks, design.repeats)
    return tuple(replace(one, begin_s=at) for one, at in zip(numbered, begins, strict=True))


def steps(blocks: Sequence[Block], design: Design, stats: Stats) -> tuple[Step, ...]:
    """All blocks in all their arms. Two blocks that follow each other are mirrored, so that a
    machine that gets slower or faster, steadily, does so to every arm alike. The control arms run
    in a share of each source's blocks; in all where caches live on, which fill with what is asked.
    """
    rng = random.Random(f"{stats.seed}:order")  # noqa: S311  # repeatable
    ordered: list[Step] = []
    for _, run in groupby(blocks, key=lambda block: block.source):
        mine = list(run)
        share = design.control_share if design.cold_blocks else 1.0
        controlled = _controlled(-(-len(mine) // 2), share)
        for at in range(0, len(mine), 2):
            arms = _arms(design) if at // 2 in controlled else (BASELINE, CANDIDATE)
            if rng.random() < 0.5:
                arms = arms[::-1]
            for block, order in zip(mine[at : at + 2], (arms, arms[::-1]), strict=False):
                ordered += [Step(block, arm) for arm in order]
    return tuple(ordered)


def _controlled(units: int, share: float) -> frozenset[int]:
    """The pairs of blocks that the control arms run in, evenly spread."""
    count = min(units, max(round(units * share), CONTROL_BLOCKS_MIN // 2))
    return frozenset(at * units // count for at in range(count))


def _arms(design: Design) -> tuple[str, ...]:
    arms: tuple[str, ...] = (BASELINE, CANDIDATE)
    if design.aa_control:
        arms = (*arms, AA)
    return (*arms, SABOTAGE) if design.sabotage_control else arms


def _sessions(items: Sequence[Item]) -> list[Session]:
    """Rows of a conversation that has several turns stay together, in their order."""
    turns = {item.cluster for item in items if item.turn > 0}
    together: dict[str, list[Item]] = {}
    for at, item in enumerate(items):
        alone = item.cluster not in turns
        together.setdefault(f"row {at}" if alone else f"of {item.cluster}", []).append(item)
    return [tuple(sorted(rows, key=lambda one: one.turn)) for rows in together.values()]


def _at_most(sessions: Sequence[Session], rows: int) -> Iterator[Session]:
    """Whole sessions, as long as they fit."""
    left = rows
    for session in sessions:
        if len(session) <= left:
            left -= len(session)
            yield session


def _packed(sessions: Iterator[Session], rows: int) -> list[tuple[Session, ...]]:
    chunks: list[tuple[Session, ...]] = []
    chunk: list[Session] = []
    for session in sessions:
        if chunk and sum(map(len, chunk)) + len(session) > rows:
            chunks.append(tuple(chunk))
            chunk = []
        chunk.append(session)
    return [*chunks, tuple(chunk)] if chunk else chunks


def _numbered(
    source: str, chunks: Sequence[tuple[Session, ...]], repeats: int
) -> tuple[Block, ...]:
    return tuple(
        Block(source, repeat * len(chunks) + at, repeat, chunk)
        for repeat in range(repeats)
        for at, chunk in enumerate(chunks)
    )
