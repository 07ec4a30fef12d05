"""What it costs to know which replica has which block: to ask, to note, to hear, to keep."""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import msgspec

from benchmarks.lab.report import About, Goal, Measured, Settings, run
from cache.blocks import BLOCK_TOKENS
from cache.prefix_index import PrefixIndex
from gateway.kv_source import Source
from gateway.prompt import root

ABOUT = About(
    name="prefix_index",
    measures=(
        "One process, one thread. An index with 8 replicas and 200,000 blocks is asked for a "
        "prompt of 1,000 blocks (16,000 tokens) of which the replicas have 300 to 1,000; "
        "prompts of as many blocks are noted as sent, new ones and known ones; a replica with "
        "100,000 blocks is forgotten. Bytes are what Python allocates for a block, its hash "
        "included. Events are batches as an engine publishes them, taken from their bytes "
        "into the index: one new block each in 64 answers that run, as maps and as arrays, "
        "and prompts of 128 blocks, with half as many blocks evicted; then what the index, "
        "the names and the hashes of it all take."
    ),
    goals=(
        Goal("match_us", 100.0, "at most", "asked for 1,000 blocks and 8 replicas in 100 us"),
        Goal("first_bytes", 260.0, "at most", "260 bytes for a block that one replica has"),
        Goal("events_blocks_per_s", 50_000.0, "at least", "50,000 blocks a second by events"),
    ),
)
REPLICAS, PROMPT, OTHERS = 8, 1000, 25_000
POOL = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    rounds = 20 if settings.quick else 300
    settings.progress("asking and noting")
    asking = _asking(rounds)
    settings.progress("keeping")
    keeping = _keeping(8_000 if settings.quick else 90_000)
    settings.progress("hearing")
    hearing = {
        name: _hearing(batches, steps=100 if settings.quick else 1000)
        for name, batches in (
            ("64 answers, maps", _answers(maps=True)),
            ("64 answers, arrays", _answers(maps=False)),
            ("prompts of 128 blocks, maps", _prompts()),
        )
    }
    slowest = min(one["blocks_per_s"] for one in hearing.values())
    values = {
        "match_us": asking["match_us"],
        "first_bytes": keeping["first_bytes"],
        "events_blocks_per_s": slowest,
    }
    return Measured({**asking, **keeping, "events": hearing}, values, {"model": "none"})


def _us(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call, in microseconds."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return median(took) * 1e6


def _hashes(count: int, rng: random.Random) -> list[bytes]:
    return [rng.randbytes(32) for _ in range(count)]


def _asking(rounds: int) -> dict[str, float]:
    rng = random.Random(0)
    index, prompt = PrefixIndex(), _hashes(PROMPT, rng)
    for replica in range(REPLICAS):
        index.size(replica, 10 * POOL)
        index.stored(replica, prompt[: PROMPT - 100 * replica])
        index.stored(replica, _hashes(OTHERS, rng))
    fresh = iter([_hashes(PROMPT, rng) for _ in range(rounds)])
    costs = {
        "match_us": _us(lambda: index.match(prompt, 0.0), rounds),
        "sent_new_us": _us(lambda: index.sent(0, next(fresh), 0.0), rounds),
        "sent_again_us": _us(lambda: index.sent(1, prompt, 0.0), rounds),
    }
    index.stored("leaves", _hashes(POOL, rng))
    return costs | {"forget_us": _us(lambda: index.forget("leaves"), 1)}


def _keeping(blocks: int) -> dict[str, float]:
    """Bytes for each block: hashes belong to whoever names the blocks first."""
    rng = random.Random(0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    hashes, index = _hashes(blocks, rng), PrefixIndex()
    taken = []
    for replica in range(REPLICAS):
        index.stored(replica, hashes)
        taken.append((tracemalloc.get_traced_memory()[0] - before) / blocks)
    tracemalloc.stop()
    return {"first_bytes": taken[0], "further_bytes": (taken[-1] - taken[0]) / (REPLICAS - 1)}


def _stored(names: list[int], parent: int | None, tokens: list[int], *, maps: bool) -> Any:
    if not maps:
        return ["BlockStored", names, parent, tokens, BLOCK_TOKENS, None, "GPU", None]
    return {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK_TOKENS,
        "medium": "GPU",
        "extra_keys": [None] * len(names),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def _removed(names: list[int], *, maps: bool) -> Any:
    if not maps:
        return ["BlockRemoved", names, "GPU"]
    return {"type": "BlockRemoved", "block_hashes": names, "medium": "GPU", "group_idx": 0}


Step = tuple[list[Any], int]  # events, and blocks in them


def _answers(*, maps: bool) -> Iterator[Step]:
    """Every step fills a block in each of 64 answers and evicts half as many old ones."""
    rng = random.Random(1)
    tips: list[int | None] = [None] * 64
    old: list[int] = []
    while True:
        events = []
        for at, tip in enumerate(tips):
            name = rng.getrandbits(64)
            tokens = [rng.randrange(150_000) for _ in range(BLOCK_TOKENS)]
            events.append(_stored([name], tip, tokens, maps=maps))
            tips[at] = name
            old.append(name)
        gone, old = old[:32], old[32:]
        yield [*events, _removed(gone, maps=maps)], 96


def _prompts() -> Iterator[Step]:
    rng = random.Random(1)
    old: list[int] = []
    while True:
        names = [rng.getrandbits(64) for _ in range(128)]
        tokens = [rng.randrange(150_000) for _ in range(128 * BLOCK_TOKENS)]
        old += names
        gone, old = old[:64], old[64:]
        yield [_stored(names, None, tokens, maps=True), _removed(gone, maps=True)], 192


def _hearing(steps_of: Iterator[Step], *, steps: int) -> dict[str, float]:
    """Batches from bytes into the index; blocks are those stored and removed."""
    encoded = []
    for number in range(steps):
        events, blocks = next(steps_of)
        encoded.append((number, msgspec.msgpack.encode([1.0 + number, events, 0]), blocks))
    source = Source(PrefixIndex(), "r", 0, partial(root, "m"), replays=False, clock=lambda: 0.0)
    source.connected()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    half = steps // 2
    for number, payload, _ in encoded[:half]:
        _drain(source.live(number, payload))
    bytes_each = (tracemalloc.get_traced_memory()[0] - before) / source.blocks
    tracemalloc.stop()
    began = time.process_time()
    for number, payload, _ in encoded[half:]:
        _drain(source.live(number, payload))
    took_s = time.process_time() - began
    return {
        "blocks_per_s": sum(blocks for _, _, blocks in encoded[half:]) / took_s,
        "batches_per_s": (steps - half) / took_s,
        "bytes_per_block": bytes_each,
    }


def _drain(work: Iterator[None]) -> None:
    for _ in work:
        pass


if __name__ == "__main__":
    sys.exit(main())
