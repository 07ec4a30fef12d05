"""Block events of a running engine: what a subscriber believes is what the pool can find."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from cache.blocks import chain_hashes, root_hash
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
@given(schedule=schedules, kept_blocks=st.sampled_from([0, 0, 6, 64]))
def test_whatever_the_schedule_a_subscriber_ends_with_what_the_pool_finds(
    model: Model, tokenizer: Tokenizer, schedule: dict[str, Any], kept_blocks: int
) -> None:
    """Shared prefixes, tenants, eviction, a tier below, preemption, cancels, a forgotten cache, a
    tiny buffer: one that listened and one that replays at the end believe the same, rightly."""
    model.blocks = schedule["blocks"]
    tiers = Tiers(MemoryTier(kept_blocks * model.block_bytes))
    arrivals, forget_step = schedule.pop("arrivals"), schedule.pop("forget_step")
    with (
        closing(publisher(buffer_steps=5)) as events,
        closing(Swap(model, tiers)) as swap,
        Subscriber(events.endpoint, events.replay_endpoint) as listener,
        Subscriber(events.endpoint, events.replay_endpoint) as late,
    ):
        engine = engine_with(events, model, tokenizer, swap=swap, **schedule)
        play(engine, PROMPTS, arrivals, forget_step)
        late.catch_up()
        listener.listen(late.known.last)
        for one in (listener, late):
            assert set(one.known.blocks) == findable(engine)
            assert_named_rightly(one.known)


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
