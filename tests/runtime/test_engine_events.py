"""Block events of a running engine: what a subscriber believes is what the pool can find."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from cache.blocks import chain_hashes, root_hash
from cache.disk import DiskTier
from cache.slot_file import slot_bytes
from cache.tiers import MemoryTier, Tiers
from cache.tokens import Tokenizer
from policies.schema import KvEvents
from runtime.engine import Engine
from runtime.events import BlockEvents
from runtime.loading import load_model
from runtime.model import Model
from runtime.swap import Swap
from tests.runtime.subscriber import Known, Subscriber
from tests.runtime.test_oracle import SHAPES, Arrival, play, schedules
from tests.runtime.tiny_models import FAMILIES, write_model

PROMPTS = [
    [7 + at % 11 for at in range(shared)] + [90 + number] * own
    for number, (own, shared) in enumerate(SHAPES)
]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, kv_tokens=4096)[0]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def publisher(**settings: Any) -> BlockEvents:
    free = {"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0"}
    return BlockEvents(KvEvents(**free | settings))


def engine_with(events: BlockEvents, model: Model, tokenizer: Tokenizer, **limits: Any) -> Engine:
    model.blocks = limits.pop("blocks", 256)
    return Engine(
        model, tokenizer, emit=lambda _: None, watchers=[events], listeners=[events], **limits
    )


def findable(engine: Engine) -> set[int]:
    """What the pool can find, by the names that leave."""
    pool = engine._pool
    hashes = (pool.hash_of(block) for block in range(pool.total))
    return {int.from_bytes(one[-8:], "big") for one in hashes if one is not None}


def assert_named_rightly(known: Known) -> None:
    """Each block's name follows from its tokens, those before it, and the first one's salt.

    A prompt that was being computed when the cache was forgotten goes on behind an unknown block.
    """
    for name, entry in known.blocks.items():
        line = [entry]
        while line[0]["parent"] in known.blocks:
            line.insert(0, known.blocks[line[0]["parent"]])
        if line[0]["parent"] is not None:
            continue
        assert not any(one["extra"] for one in line[1:])
        salt = line[0]["extra"][0] if line[0]["extra"] else None
        tokens = [token for one in line for token in one["tokens"]]
        last = chain_hashes(root_hash(model="", salt=salt), tokens)[-1]
        assert int.from_bytes(last[-8:], "big") == name


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
@given(
    schedule=schedules,
    kept_blocks=st.sampled_from([0, 0, 6, 64]),
    on_disk=st.sampled_from([0, 0, 4, 100]),
)
def test_whatever_the_schedule_a_subscriber_ends_with_what_can_be_found(
    model: Model,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    schedule: dict[str, Any],
    kept_blocks: int,
    on_disk: int,
) -> None:
    """Shared prefixes, tenants, eviction, tiers below, preemption, cancels, a forgotten cache, a
    tiny buffer: one that listened and one that replays at the end believe the same, rightly, of
    the pool and of each tier."""
    model.blocks = schedule["blocks"]
    disk = None
    if on_disk:
        disk = disk_tier(model, tmp_path_factory.mktemp("tier"), on_disk)
    tiers = Tiers(MemoryTier(kept_blocks * model.block_bytes), disk)
    arrivals, forget_step = schedule.pop("arrivals"), schedule.pop("forget_step")
    with (
        closing(publisher(buffer_steps=5)) as events,
        closing(Swap(model, tiers)) as swap,
        Subscriber(events.endpoint, events.replay_endpoint) as listener,
        Subscriber(events.endpoint, events.replay_endpoint) as late,
    ):
        events.follow(tiers)
        engine = engine_with(events, model, tokenizer, swap=swap, **schedule)
        play(engine, PROMPTS, arrivals, forget_step)
        tell_the_rest(events, disk)
        late.catch_up()
        listener.listen(late.known.last)
        for one in (listener, late):
            assert set(one.known.blocks) == findable(engine)
            assert kept(one.known, "CPU") == names(tiers.memory._blocks)
            assert kept(one.known, "STORAGE") == (names(disk._own.keys()) if disk else set())
            assert_named_rightly(one.known)
        engine.check()


def disk_tier(model: Model, folder: Path, blocks: int) -> DiskTier:
    size = model.block_bytes
    limit = blocks * slot_bytes(size)
    return DiskTier(folder, limit_bytes=limit, block_bytes=size, identity={"model": "tiny"})


def tell_the_rest(events: BlockEvents, disk: DiskTier | None) -> None:
    """What tiers did behind the last step is told with the next one."""
    if disk is not None:
        assert disk.drain(10)
    events.stepped(None)  # type: ignore[arg-type]  # only that a step ended counts


def names(hashes: Iterable[bytes]) -> set[int]:
    return {int.from_bytes(one[-8:], "big") for one in hashes}


def kept(known: Known, medium: str) -> set[int]:
    return set(known.below.get(medium, ()))


def test_a_router_sees_where_a_block_went_and_that_it_came_back(
    model: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A conversation that others push out of a small pool: its blocks go to memory and disk, as
    media of their own, and stay there when the pool has them again."""
    model.blocks = 16
    disk = disk_tier(model, tmp_path, 200)
    tiers = Tiers(MemoryTier(100 * model.block_bytes), disk)
    talk, *others = ([7 + number] * 100 for number in range(4))
    with (
        closing(publisher()) as events,
        closing(Swap(model, tiers)) as swap,
        Subscriber(events.endpoint, events.replay_endpoint) as router,
    ):
        events.follow(tiers)
        engine = engine_with(events, model, tokenizer, blocks=16, swap=swap)
        mine = names(chain_hashes(root_hash(model=""), talk))
        assert len(mine) == 6
        play(engine, [talk], [Arrival(0, 0, 2, None)])
        router.catch_up()
        assert mine <= set(router.known.blocks)
        assert router.known.below == {}
        play(engine, others, [Arrival(at, 20 * at, 2, None) for at in range(3)])
        tell_the_rest(events, disk)
        router.catch_up()
        assert not mine & set(router.known.blocks)
        assert mine <= kept(router.known, "CPU")
        assert mine <= kept(router.known, "STORAGE")
        assert router.known.below["CPU"].keys() <= router.known.below["STORAGE"].keys()
        play(engine, [talk], [Arrival(0, 0, 2, None)])
        tell_the_rest(events, disk)
        router.catch_up()
        for there in (set(router.known.blocks), kept(router.known, "CPU")):
            assert mine <= there
        assert swap.counts.host_hits >= 5
        engine.forget_cached()
        engine.take_orders(wait=False)
        router.catch_up()
        assert (router.known.blocks, router.known.below) == ({}, {})


@pytest.mark.parametrize("corrupt", [False, True])
def test_what_tiers_give_up_is_told(
    model: Model, tokenizer: Tokenizer, tmp_path: Path, corrupt: bool
) -> None:
    """Memory for three blocks and a disk for four, both too small for what a small pool gives up;
    or a disk whose blocks turn out to be damaged when they are wanted again."""
    model.blocks = 16
    disk = disk_tier(model, tmp_path, 100 if corrupt else 4)
    tiers = Tiers(MemoryTier(3 * model.block_bytes), disk)
    talks = [[7 + number] * 100 for number in range(5)]
    with (
        closing(publisher(buffer_steps=5)) as events,
        closing(Swap(model, tiers)) as swap,
        Subscriber(events.endpoint, events.replay_endpoint) as router,
    ):
        events.follow(tiers)
        engine = engine_with(events, model, tokenizer, blocks=16, swap=swap)
        rounds = [Arrival(at, 20 * at, 2, None) for at in range(5)]
        for _ in range(2):
            play(engine, talks, rounds)
            assert disk.drain(10)
            if corrupt:
                (file,) = tmp_path.rglob("blocks")
                file.write_bytes(b"\xff" * file.stat().st_size)
        tell_the_rest(events, disk)
        router.catch_up()
        assert (disk.counts.corrupt if corrupt else disk.counts.evicted) > 0
        assert tiers.memory.counts.evicted > 5
        assert kept(router.known, "CPU") == names(tiers.memory._blocks) != set()
        assert kept(router.known, "STORAGE") == names(disk._own.keys()) != set()


def test_what_an_earlier_life_left_on_disk_is_told_once_it_has_a_name(
    model: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The folder knows hashes alone: after a restart its blocks are told when their tokens come."""
    talk = [9] * 100
    for life in range(2):
        disk = disk_tier(model, tmp_path, 200)
        with (
            closing(publisher()) as events,
            closing(Swap(model, Tiers(MemoryTier(0), disk))) as swap,
            Subscriber(events.endpoint, events.replay_endpoint) as router,
        ):
            events.follow(swap.tiers)
            engine = engine_with(events, model, tokenizer, blocks=64, swap=swap)
            tell_the_rest(events, disk)
            router.catch_up()
            assert router.known.below == {}
            play(engine, [talk], [Arrival(0, 0, 2, None)])
            tell_the_rest(events, disk)
            router.catch_up()
            assert kept(router.known, "STORAGE") == (set(router.known.blocks) if life else set())


def test_the_schedules_reach_eviction_and_snapshots(model: Model, tokenizer: Tokenizer) -> None:
    """The property above is not vacuous: blocks are evicted, and more steps are told than kept."""
    with (
        closing(publisher(buffer_steps=5)) as events,
        Subscriber(events.endpoint, events.replay_endpoint) as late,
    ):
        engine = engine_with(events, model, tokenizer, blocks=8, step_tokens=64)
        arrivals = [Arrival(at % len(SHAPES), at, 20, None) for at in range(20)]
        play(engine, PROMPTS, arrivals)
        batches = late.replay(0)
        assert engine.load().evictions > 10
        assert batches[0][1] > 5
        assert len(batches) == 6
        late.catch_up()
        assert set(late.known.blocks) == findable(engine) != set()


def test_forgetting_the_cache_of_an_idle_engine_is_told(model: Model, tokenizer: Tokenizer) -> None:
    """No step follows for a long time; subscribers hear of it all the same."""
    with (
        closing(publisher()) as events,
        Subscriber(events.endpoint, events.replay_endpoint) as other,
    ):
        engine = engine_with(events, model, tokenizer)
        play(engine, PROMPTS, [Arrival(9, 0, 4, None)])
        other.catch_up()
        assert len(other.known.blocks) == 4
        engine.forget_cached()
        engine.take_orders(wait=False)
        other.listen(other.known.last + 1)
        assert other.known.blocks == {}
