"""Block hash -> replicas that hold the block: what a router asks for the longest known prefix.

Knows chained hashes (blocks.py) and names of replicas; no tokens, sockets or clocks. A replica is
known by what was sent to it (approximate), by what it tells itself (exact: events, each medium and
rank apart), or by both (degraded: events were missed, so that what it told since is right but not
all). Bounded for each replica; what a block takes is measured by its test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

POOL = "GPU"  # the engine's own pool, as vLLM calls it on every device
CAPACITY_BLOCKS = 2**15  # of a replica that does not tell: half a million tokens
TOLD_BLOCKS_MAX = 2**21  # that one source may tell of itself
TTL_S = 900.0  # what was sent longer ago is not counted on
PLEDGE_S = 10.0  # the same for a replica that tells: by then it has told
_SPARE_SHARE = 32  # a full record gives up this part of itself at once
_TTL_STEPS = 64  # records are looked through for what is too old this often within their time
_SWEEP_MIN = 64  # blocks of forgotten records that each call clears away, at least
_SWEEPS_MAX = 8  # forgotten records that may wait
_MASKS_MAX = 2**16  # distinct sets of holders that are remembered


class Mode(Enum):
    """How a replica's blocks are known."""

    APPROXIMATE = "approximate"
    EXACT = "exact"
    DEGRADED = "degraded"


class TooManyBlocks(Exception):
    """A replica tells of more blocks than any pool has."""


@dataclass(slots=True, eq=False)
class Record:
    """The blocks of one replica by one source, as one bit of every block's mask.

    `medium` is None for what was sent. `blocks` are in the order of their last mention.
    """

    bit: int
    owner: int  # the replica's bit
    medium: str | None
    blocks: dict[bytes, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Known:
    """What is known of one replica."""

    bit: int
    sent: Record
    told: dict[tuple[int, str], Record] = field(default_factory=dict)  # by rank and medium
    mode: Mode = Mode.APPROXIMATE
    capacity_blocks: int = CAPACITY_BLOCKS
    most_blocks: int = TOLD_BLOCKS_MAX  # it is no larger
    due: float = float("inf")  # when something of `sent` is too old


class PrefixIndex:
    """All replicas' blocks. One thread."""

    def __init__(
        self,
        *,
        ttl_s: float = TTL_S,
        pledge_s: float = PLEDGE_S,
        told_blocks_max: int = TOLD_BLOCKS_MAX,
    ) -> None:
        self._told_blocks_max = told_blocks_max
        self._ttl_s = {Mode.APPROXIMATE: ttl_s, Mode.DEGRADED: ttl_s, Mode.EXACT: pledge_s}
        self._masks: dict[bytes, int] = {}  # block -> bits of the records that have it
        self._same: dict[int, int] = {}  # one object for equal masks
        self._owners: dict[int, int] = {}  # mask -> bits of the replicas; also: in their pool alone
        self._pools: dict[int, int] = {}
        self._records: dict[int, Record] = {}
        self._replicas: dict[Hashable, Known] = {}
        self._names: dict[int, Hashable] = {}  # a replica's bit -> its name
        self._sweeping: deque[Record] = deque()
        self._due = float("inf")

    def __len__(self) -> int:
        """Blocks that any replica holds, and those of forgotten ones that are not cleared away."""
        return len(self._masks)

    # ---- what a router asks ----------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes], now: float) -> dict[Hashable, int]:
        """How many leading blocks of `hashes` each replica has; those with none are left out.

        A block counts in any medium, and where it was sent to is counted on.
        """
        if now >= self._due:
            self._expire(now)
        return self._depths(hashes, self._owners, None)

    def in_pool(self, hashes: Sequence[bytes]) -> dict[Hashable, int]:
        """The same by what replicas told of their pools alone: what is there without loading."""
        return self._depths(hashes, self._pools, POOL)

    def _depths(
        self, hashes: Sequence[bytes], folded: dict[int, int], medium: str | None
    ) -> dict[Hashable, int]:
        depths: dict[Hashable, int] = {}
        holding, last, at = -1, -1, 0
        for at, mask in enumerate(map(self._masks.get, hashes)):
            if mask is last:
                continue
            if mask is None:
                break
            last = mask
            owners = folded.get(mask)
            if owners is None:
                owners = self._fold(mask, folded, medium)
            if holding < 0:
                holding = owners
            elif lost := holding & ~owners:
                for bit in _bits(lost):
                    depths[self._names[bit]] = at
                holding &= owners
            if not holding:
                break
        else:
            at = len(hashes)
        if holding > 0:
            for bit in _bits(holding):
                depths[self._names[bit]] = at
        return depths

    def replicas(self) -> list[Hashable]:
        """Those of which anything was noted."""
        return list(self._replicas)

    def mode(self, replica: Hashable) -> Mode:
        known = self._replicas.get(replica)
        return Mode.APPROXIMATE if known is None else known.mode

    def told(self, replica: Hashable, medium: str = POOL) -> set[bytes]:
        """The blocks that a replica told to have in a medium, in any of its ranks."""
        known = self._replicas.get(replica)
        records = known.told.items() if known else ()
        return {one for (_, where), record in records if where == medium for one in record.blocks}

    def report(self, replica: Hashable) -> Mapping[str, object]:
        """For health answers: the mode, and blocks by where they are known from."""
        known = self._replicas.get(replica)
        counts: dict[str, int] = {}
        for (_, medium), record in known.told.items() if known else ():
            counts[medium] = counts.get(medium, 0) + len(record.blocks)
        sent = len(known.sent.blocks) if known else 0
        return {"mode": self.mode(replica).value, "sent": sent, "told": counts}

    # ---- what was sent ---------------------------------------------------------------------------

    def size(self, replica: Hashable, capacity_blocks: int) -> None:
        """How many blocks a replica is thought to have room for."""
        known = self._known(replica)
        known.capacity_blocks = max(1, min(capacity_blocks, known.most_blocks))

    def limit(self, replica: Hashable, most_blocks: int) -> None:
        """How many it has at most, as it says itself, whatever is thought."""
        known = self._known(replica)
        known.most_blocks = max(1, most_blocks)
        known.capacity_blocks = min(known.capacity_blocks, known.most_blocks)

    def sent(self, replica: Hashable, hashes: Sequence[bytes], now: float) -> None:
        """A prompt went there: it will have these blocks. The ends of prompts are given up first,
        so that what remains of one is always its beginning."""
        if not hashes:
            return
        known = self._known(replica)
        record = known.sent
        hashes = hashes[: known.capacity_blocks]
        pop = record.blocks.pop
        fresh = [one for one in hashes if pop(one, None) is None]
        record.blocks.update(dict.fromkeys(reversed(hashes), now))
        self._set(fresh, record.bit)
        if (over := len(record.blocks) - known.capacity_blocks) > 0:
            over += known.capacity_blocks // _SPARE_SHARE
            self._drop(record, list(islice(record.blocks, over)))
        self._sweep(len(hashes))
        known.due = min(known.due, now + self._ttl_s[known.mode])
        self._due = min(self._due, known.due)

    def _expire(self, now: float) -> None:
        """Gives up what was sent too long ago."""
        for known in self._replicas.values():
            if now < known.due:
                continue
            ttl_s = self._ttl_s[known.mode]
            old = []
            known.due = float("inf")
            for one, at in known.sent.blocks.items():
                if at + ttl_s > now:
                    known.due = max(at + ttl_s, now + ttl_s / _TTL_STEPS)
                    break
                old.append(one)
            self._drop(known.sent, old)
        self._due = min((known.due for known in self._replicas.values()), default=float("inf"))

    # ---- what replicas tell of themselves --------------------------------------------------------

    def stored(
        self, replica: Hashable, hashes: Iterable[bytes], medium: str = POOL, rank: int = 0
    ) -> None:
        """Raises TooManyBlocks; then none of these is noted."""
        record = self._told(replica, rank, medium)
        fresh = [one for one in hashes if one not in record.blocks]
        if len(record.blocks) + len(fresh) > self._told_blocks_max:
            raise TooManyBlocks(f"more than {self._told_blocks_max} blocks in {medium}")
        record.blocks.update(dict.fromkeys(fresh, 0.0))
        self._set(fresh, record.bit)
        self._sweep(len(fresh))

    def removed(
        self, replica: Hashable, hashes: Iterable[bytes], medium: str = POOL, rank: int = 0
    ) -> None:
        """Also what was only sent is given up with it: the replica says that it is gone."""
        known = self._known(replica)
        gone = list(hashes)
        self._drop(self._told(replica, rank, medium), gone)
        if medium == POOL:
            self._drop(known.sent, gone)

    def cleared(self, replica: Hashable, rank: int | None = None) -> None:
        """Nothing is left in any medium, of one rank or of all; nor of what was sent before."""
        self._renew_sent(self._known(replica))
        self.unlearn(replica, rank)

    def trust(self, replica: Hashable, mode: Mode) -> None:
        """EXACT: what the replica tells is all that it has, and what was sent only bridges the time
        until it has told."""
        known = self._known(replica)
        if known.mode is not mode:
            known.mode = mode
            known.due = self._due = float("-inf")  # by another time: all is looked at again

    def demote(self, replica: Hashable, now: float, rank: int | None = None) -> None:
        """It told of changes that nobody heard. What it told of its pool is from now on no better
        than what was sent: it counts as the oldest of it, and decays."""
        known = self._known(replica)
        before: dict[bytes, float] = {}
        for key in [key for key in known.told if key[1] == POOL and rank in (None, key[0])]:
            fresh = [one for one in known.told[key].blocks if one not in known.sent.blocks]
            self._set(fresh, known.sent.bit)
            before.update(dict.fromkeys(fresh, now))
        self.unlearn(replica, rank)
        if before:
            known.sent.blocks = before | known.sent.blocks
            known.due = min(known.due, now + self._ttl_s[known.mode])
            self._due = min(self._due, known.due)

    def unlearn(self, replica: Hashable, rank: int | None = None) -> None:
        """What it told is about to be told again, from the beginning."""
        known = self._known(replica)
        for key in [key for key in known.told if rank in (None, key[0])]:
            self._retire(known.told.pop(key))

    def forget(self, replica: Hashable) -> None:
        """Nothing is known of it any more. Costs the same however much that was."""
        known = self._replicas.pop(replica, None)
        if known is None:
            return
        del self._names[known.bit]
        for record in (known.sent, *known.told.values()):
            self._retire(record)

    # ---- bits ------------------------------------------------------------------------------------

    def _known(self, replica: Hashable) -> Known:
        known = self._replicas.get(replica)
        if known is None:
            bit = _free_bit(self._names)
            known = Known(bit, self._record(bit, None))
            self._replicas[replica] = known
            self._names[bit] = replica
        return known

    def _told(self, replica: Hashable, rank: int, medium: str) -> Record:
        known = self._known(replica)
        record = known.told.get((rank, medium))
        if record is None:
            record = known.told[rank, medium] = self._record(known.bit, medium)
        return record

    def _renew_sent(self, known: Known) -> None:
        self._retire(known.sent)
        known.sent = self._record(known.bit, None)

    def _record(self, owner: int, medium: str | None) -> Record:
        taken = {*self._records, *(record.bit for record in self._sweeping)}
        record = Record(_free_bit(taken), owner, medium)
        self._records[record.bit] = record
        self._forget_folds()
        return record

    def _retire(self, record: Record) -> None:
        """Its bit counts no more, and is used again once it is cleared in every mask."""
        del self._records[record.bit]
        self._sweeping.append(record)
        self._forget_folds()
        if len(self._sweeping) > _SWEEPS_MAX:
            self._sweep(len(self._sweeping[0].blocks) + 1)

    def _forget_folds(self) -> None:
        self._owners.clear()
        self._pools.clear()

    def _fold(self, mask: int, folded: dict[int, int], medium: str | None) -> int:
        """The replicas that a mask's records belong to; `medium`: only by records of it."""
        owners = 0
        for bit in _bits(mask):
            record = self._records.get(bit)
            if record is not None and medium in (None, record.medium):
                owners |= record.owner
        if len(folded) >= _MASKS_MAX:
            folded.clear()
        folded[mask] = owners
        return owners

    def _set(self, blocks: Iterable[bytes], bit: int) -> None:
        masks, same = self._masks, self._same
        if len(same) >= _MASKS_MAX:
            same.clear()
        for one in blocks:
            mask = masks.get(one, 0) | bit
            masks[one] = same.setdefault(mask, mask)

    def _drop(self, record: Record, blocks: Iterable[bytes]) -> None:
        pop = record.blocks.pop
        self._clear([one for one in blocks if pop(one, None) is not None], record.bit)

    def _clear(self, blocks: Iterable[bytes], bit: int) -> None:
        masks, same = self._masks, self._same
        for one in blocks:
            mask = masks[one] & ~bit
            if mask:
                masks[one] = same.setdefault(mask, mask)
            else:
                del masks[one]

    def _sweep(self, blocks: int) -> None:
        """Clears away what was forgotten, a little more than what came."""
        left = 2 * blocks + _SWEEP_MIN
        while self._sweeping and left > 0:
            record = self._sweeping[0]
            some = min(left, len(record.blocks))
            self._clear([record.blocks.popitem()[0] for _ in range(some)], record.bit)
            left -= some
            if not record.blocks:
                self._sweeping.popleft()


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _free_bit(taken: Iterable[int]) -> int:
    used = 0
    for bit in taken:
        used |= bit
    return ~used & (used + 1)
