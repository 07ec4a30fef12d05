"""Blocks that the KV pool has given up come back from the tiers below when they are asked for.

Knows when loading beats computing again: both are estimated from what this machine has shown. What
lies in host memory is copied at admission; what lies deeper is staged into memory by a thread while
its sequence waits and others go on, and never longer than computing it would take: so waiting in
vain at most doubles the time. Runs in the engine's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence as Many
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.blocks import BLOCK_TOKENS
from cache.disk import DiskTier
from cache.tiers import NEWEST, Data, MemoryTier, Promotion, Tiers
from policies import schema as policy
from runtime.costs import StepCosts
from runtime.kv import BlockPool
from runtime.model import Model, ModelRefused
from runtime.sequence import Sequence
from runtime.spill import Spill

# How long a sequence waits for a lower tier where the costs of computing are not known.
PATIENCE_S = 1.0
# On their way up at the same time, beyond what the memory tier may hold; one run may exceed it.
STAGING_BYTES = 256 * 2**20
_PROBE_BLOCKS = 8
# A tier that seems too slow is tried again with this many blocks, at most this often.
_SAMPLE_BLOCKS, _SAMPLE_EVERY_S = 8, 1.0
COPY_S_MAX = 0.1  # of a step, for copying into the pool; one block is copied in any case
_COPY_S_MIN = 0.005


@dataclass(slots=True)
class SwapCounts:
    """Full blocks that admitted sequences lacked, by where they came from, and what was decided."""

    pool_hits: int = 0
    host_hits: int = 0
    lower_hits: int = 0  # staged from the tier below memory
    misses: int = 0  # computed
    declined: int = 0  # of these, what a tier had but computing seemed cheaper
    waits: int = 0  # times that a sequence waited for a lower tier
    timeouts: int = 0  # of these, given up before everything had come
    read_s: float = 0.0  # copying out of the pool
    write_s: float = 0.0  # copying into it


@dataclass(slots=True, eq=False)
class _Staging:
    """A run on its way to memory, and who waits for it: all whose next block is its first."""

    promotion: Promotion
    began: float
    users: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Plan:
    """What a waiting sequence is going to load: its blocks up to `end`, counted from its start."""

    end: int
    near: int  # up to here they were in memory from the beginning
    stagings: list[_Staging] = field(default_factory=list)  # only the last one may be under way
    give_up: float = 0.0
    settled: bool = False


class Swap:
    """The scheduler's source of what the pool once had; its `spill` is what stores it."""

    def __init__(
        self,
        model: Model,
        tiers: Tiers,
        *,
        costs: StepCosts | None = None,
        copy_s_max: float = COPY_S_MAX,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers = tiers
        self.costs = costs
        self.counts = SwapCounts()
        self.spill = Spill(model, tiers, self.counts)
        self._model = model
        self._block_bytes = model.block_bytes
        self._now = now
        self._copy = tiers.memory.rate  # into the pool
        self._handover_s = 0.0  # what a staging takes beyond the reading itself
        self._sample_at = 0.0
        self._copy_s_max = copy_s_max
        self._step_s = copy_s_max  # left of this step for copying into the pool
        self._plans: dict[int, _Plan] = {}
        self._stagings: dict[bytes, _Staging] = {}

    def measure(self) -> None:
        """Copies a few blocks out of the pool and in again, before it holds anything, and has the
        other thread bring up nothing."""
        blocks = list(range(min(_PROBE_BLOCKS, self._model.blocks)))
        for _ in range(2):  # the first time pays for fresh memory
            data = self.spill.read(blocks)
            began = time.perf_counter()
            self._write(blocks, data)
            seconds = time.perf_counter() - began
        self._copy.saw(len(blocks) * self._block_bytes, seconds)
        if self.tiers.lower is not None:
            done = threading.Event()
            began = time.perf_counter()
            if nothing := self.tiers.promote((), lambda _: done.set()):
                done.wait(1.0)
                self._handover_s = time.perf_counter() - began
                self.tiers.release(nothing)

    def attach(self, pool: BlockPool, wake: Callable[[], None]) -> None:
        """The pool that is served; `wake` is called in another thread when waiting may end."""
        self.spill.attach(pool)
        self._wake = wake

    def close(self) -> None:
        """Stores what the pool can still find and ends the tiers."""
        for key in list(self._plans):
            self.leave(key)
        self.spill.save()
        self.tiers.close()

    @property
    def copied_s(self) -> float:
        """Seconds of copying so far, both ways."""
        return self.counts.read_s + self.counts.write_s

    def report(self) -> dict[str, Any]:
        """For health answers, from any thread: every tier's counts and measured speed, and what
        became of lookups."""
        tiers = {
            tier.name: {**asdict(tier.counts), "bytes_per_s": tier.rate.bytes_per_s}
            for tier in (self.tiers.memory, self.tiers.lower)
            if tier is not None
        }
        return {**tiers, "blocks": asdict(self.counts)}

    # ---- what the scheduler asks -----------------------------------------------------------------

    def ready(self, sequence: Sequence, first: int, end: int) -> int | None:
        """How many of the blocks `first` to `end` can be loaded now; None: wait for more."""
        if first >= end:
            return 0
        plan = self._plans.get(sequence.key)
        if plan is None:
            plan = self._plans[sequence.key] = _Plan(first, first)
            self._extend(plan, sequence, first, end)
            plan.near = plan.end
        while not plan.settled:
            staging = plan.stagings[-1]
            late = self._now() >= plan.give_up
            if not (staging.promotion.done or late):
                return None
            self._settle(plan, staging)
            if not plan.settled:
                self._extend(plan, sequence, plan.end, end)
        return max(0, min(plan.end, end) - first)

    def begin_step(self, allowed_s: float) -> None:
        """Half of what a step may take is for copying, but always some, and never very much."""
        self._step_s = min(max(allowed_s / 2, _COPY_S_MIN), self._copy_s_max)

    def fetch(self, sequence: Sequence, first: int, count: int) -> list[Data] | None:
        """Up to `count` blocks from block `first` on, as far as memory has them; None when this
        step has no time left for copying."""
        if self._step_s <= 0:
            return None
        rate = self._copy.bytes_per_s
        if rate is not None:
            count = min(count, max(1, int(self._step_s * rate / self._block_bytes)))
        return self.tiers.load(sequence.hashes[first : first + count])

    def load(self, blocks: Many[int], data: Many[Data]) -> None:
        """Fills blocks of the pool with what `fetch` gave."""
        began = time.perf_counter()
        self._write(blocks, data)
        seconds = time.perf_counter() - began
        self.counts.write_s += seconds
        self._step_s -= seconds
        self._copy.saw(len(blocks) * self._block_bytes, seconds)

    def admitted(self, sequence: Sequence, held: int, found: int, loaded: int) -> int:
        """Counts where the full blocks behind the first `held` of a sequence came from; how many of
        the loaded ones came from memory."""
        plan, counts = self._plans.get(sequence.key), self.counts
        near = 0 if plan is None else min(loaded, max(0, plan.near - held - found))
        counts.pool_hits += found
        counts.host_hits += near
        counts.lower_hits += loaded - near
        counts.misses += max(0, len(sequence.hashes) - held - found - loaded)
        self.leave(sequence.key)
        return near

    def leave(self, key: int) -> None:
        """A sequence waits for nothing any more: it is admitted, has ended or was cancelled."""
        plan = self._plans.pop(key, None)
        for staging in plan.stagings if plan is not None else ():
            staging.users.discard(key)
            if not staging.users:
                self.tiers.release(staging.promotion)
                self._stagings.pop(staging.promotion.keys[0], None)

    def distrust(self, hashes: Many[bytes]) -> None:
        """Values that went wrong are not to come back."""
        self.tiers.forget(hashes)

    # ---- deciding --------------------------------------------------------------------------------

    def _extend(self, plan: _Plan, sequence: Sequence, first: int, end: int) -> None:
        """Takes what memory has, and stages what lies deeper, as far as that is worth it."""
        plan.settled = True
        keys = sequence.hashes[first:end]
        near, far = self.tiers.find(keys)
        size = self._block_bytes
        if near and self._copy.seconds(near * size) > self._compute_s(first, first + near):
            self.counts.declined += far
            return
        plan.end = first + near
        deep, lower = far - near, self.tiers.lower
        if not deep or lower is None:
            return
        compute_s = self._compute_s(plan.end, plan.end + deep)
        stage_s = lower.rate.seconds(deep * size) + self._copy.seconds(deep * size)
        wanted = keys[near:far]
        if stage_s + self._handover_s > compute_s:
            self._decline(wanted)
        elif self._stage(plan, sequence.key, wanted):
            patience_s = PATIENCE_S if self.costs is None else compute_s
            plan.give_up = self._now() + patience_s
            plan.settled = False

    def _compute_s(self, first: int, end: int) -> float:
        """Seconds of computing these blocks; without end where costs are not known."""
        if self.costs is None:
            return float("inf")
        return self.costs.prefill_s((end - first) * BLOCK_TOKENS, first * BLOCK_TOKENS)

    def _stage(self, plan: _Plan, key: int, wanted: Many[bytes]) -> bool:
        staging = self._stagings.get(wanted[0])
        if staging is None:
            promotion = self.tiers.promote(wanted, self._arrived)
            if promotion is None:
                self.counts.declined += len(wanted)
                return False
            staging = self._stagings[wanted[0]] = _Staging(promotion, self._now())
        self.counts.waits += 1
        staging.users.add(key)
        plan.stagings.append(staging)
        return True

    def _settle(self, plan: _Plan, staging: _Staging) -> None:
        """The wait is over: `settled` unless all has come and there may be more behind it."""
        promotion = staging.promotion
        plan.end += promotion.arrived
        plan.settled = promotion.arrived < len(promotion.keys)
        if promotion.done:
            over = max(0.0, self._now() - staging.began - promotion.service_s)
            self._handover_s += NEWEST * (over - self._handover_s)
        else:
            self.counts.timeouts += 1

    def _decline(self, wanted: Many[bytes]) -> None:
        """Computes instead, and lets the tier show from time to time whether it is faster now."""
        self.counts.declined += len(wanted)
        self._handover_s *= 1 - NEWEST
        if self._now() >= self._sample_at:
            self._sample_at = self._now() + _SAMPLE_EVERY_S
            self.tiers.promote(wanted[:_SAMPLE_BLOCKS], self.tiers.release)

    def _arrived(self, _: Promotion) -> None:
        self._wake()

    def _write(self, blocks: Many[int], data: Many[Data]) -> None:
        rows = [np.frombuffer(one, dtype=np.uint8) for one in data]
        writable = [row if row.flags.writeable else row.copy() for row in rows]  # torch wants that
        self._model.write_blocks(blocks, [torch.from_numpy(row) for row in writable])


def open_swap(model: Model, wanted: policy.Tiers, identity: str) -> Swap:
    """The tiers of a policy; `identity` says whose keys and values they hold.

    Raises ModelRefused for a disk tier that has no room for this model's blocks.
    """
    disk = None
    if wanted.disk is not None:
        try:
            disk = DiskTier(
                Path(wanted.disk.path),
                limit_bytes=wanted.disk.max_bytes,
                block_bytes=model.block_bytes,
                identity={"model": identity, "block": model.block_format},
            )
        except ValueError as error:
            raise ModelRefused(f"runtime.tiers.disk.max_bytes: {error}; give it more") from None
    staging = max(1, STAGING_BYTES // model.block_bytes)
    return Swap(model, Tiers(MemoryTier(wanted.host_bytes), disk, staging_blocks=staging))
