"""The engine's greedy output equals transformers' `generate`, whatever the schedule."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from transformers import AutoModelForCausalLM

from cache.tokens import Tokenizer
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.model import Model, ModelRefused
from runtime.sequence import Output, Sampling, Service
from tests.runtime.tiny_models import FAMILIES, REFUSED, VOCAB, WINDOW, write_model

ANSWER = 28
# More of them, newly drawn, for a thorough run: HEADGATE_ORACLE_EXAMPLES=100 pytest tests/runtime.
EXAMPLES = int(os.environ.get("HEADGATE_ORACLE_EXAMPLES", "0"))
# (tokens of its own, tokens that it shares with others before them)
SHAPES = ((1, 0), (2, 0), (15, 0), (16, 0), (17, 0), (0, 32), (1, 32), (0, 47), (38, 32), (6, 64))
LENGTHS = tuple(own + shared for own, shared in SHAPES)
torch.set_num_threads(1)


@dataclass(frozen=True)
class Family:
    """A model folder, our model on it, and what `generate` says to each prompt."""

    folder: Path
    model: Model
    tokenizer: Tokenizer
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Name -> Family, built once each."""

    @cache
    def build(name: str) -> Family:
        folder = write_model(tmp_path_factory.mktemp(name), *FAMILIES[name])
        rng = random.Random(name)
        common = [rng.randrange(VOCAB) for _ in range(64)]
        prompts = [
            common[:shared] + [rng.randrange(VOCAB) for _ in range(own)] for own, shared in SHAPES
        ]
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = [generate(reference, prompt) for prompt in prompts]
        model, _ = load_model(folder, kv_tokens=4096)
        return Family(folder, model, Tokenizer.load(folder), prompts, expected)

    return build


def generate(reference, prompt: list[int], count: int = ANSWER) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Arrival:
    prompt: int
    step: int
    tokens: int
    cancel_step: int | None
    priority: int = 0
    salt: str | None = None


schedules = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([16, 17, 33, 64, 512]),
        "max_sequences": st.integers(1, 12),
        "blocks": st.sampled_from([8, 11, 16, 256]),
        "arrivals": st.lists(
            st.builds(
                Arrival,
                prompt=st.integers(0, len(LENGTHS) - 1),
                step=st.integers(0, 30),
                tokens=st.integers(1, ANSWER),
                cancel_step=st.one_of(st.none(), st.none(), st.integers(0, 50)),
                priority=st.sampled_from([0, 0, 0, -1, 2]),
                salt=st.sampled_from([None, None, "tenant"]),
            ),
            min_size=1,
            max_size=10,
        ),
        "forget_step": st.one_of(st.none(), st.integers(0, 40)),
    }
)


def play(
    engine: Engine,
    prompts: list[list[int]],
    arrivals: list[Arrival],
    forget_step: int | None = None,
) -> list[list[int]]:
    """Runs a schedule step by step; the tokens that each arrival got."""
    keys: dict[int, int] = {}
    got: list[list[int]] = [[] for _ in arrivals]
    step = 0
    while len(keys) < len(arrivals) or engine.load().running or engine.load().waiting:
        for at, arrival in enumerate(arrivals):
            if arrival.step == step:
                sampling = Sampling(temperature=0, max_tokens=arrival.tokens, ignore_eos=True)
                service = Service(arrival.priority)
                order = Order(prompts[arrival.prompt], sampling, service, arrival.salt)
                keys[engine.submit([order])[0]] = at
            if arrival.cancel_step == step:
                engine.cancel([key for key, number in keys.items() if number == at])
        if step == forget_step:
            engine.forget_cached()
        engine.take_orders(wait=False)
        collect(engine.step(), keys, got)
        step += 1
        assert step < 3000, "the schedule does not end"
    return got


def collect(outputs: list[Output], keys: dict[int, int], got: list[list[int]]) -> None:
    for output in outputs:
        assert output.error is None
        got[keys[output.key]] += output.token_ids


def engine_on(one: Family, **limits: int) -> Engine:
    blocks = limits.pop("blocks", 256)
    one.model.blocks = blocks  # a smaller pool than the tensors hold: preemption comes early
    return Engine(one.model, one.tokenizer, emit=lambda _: None, **limits)


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=EXAMPLES or 8,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
@given(schedule=schedules)
def test_any_schedule_gives_what_generate_gives(family, name, schedule):
    """Arrivals, classes, chunk sizes, batch mixes, preemption, cancels, found prefixes and a cache
    that is forgotten in between never change a greedy answer."""
    one = family(name)
    arrivals, forget_step = schedule.pop("arrivals"), schedule.pop("forget_step")
    engine = engine_on(one, **schedule)
    got = play(engine, one.prompts, arrivals, forget_step)
    for arrival, tokens in zip(arrivals, got, strict=True):
        expected = one.expected[arrival.prompt][: arrival.tokens]
        if arrival.cancel_step is None:
            assert tokens == expected
        else:
            assert tokens == expected[: len(tokens)]
    counts = engine.load().blocks
    assert (counts.free + counts.cached, counts.in_use) == (counts.total, 0)
    engine.check()


def test_the_schedules_reach_preemption_and_chunking(family):
    """The property above is not vacuous: a small pool preempts, a small budget cuts prompts."""
    one = family("llama")
    engine = engine_on(one, blocks=8, step_tokens=16, max_sequences=12)
    own = [at for at, (own, _) in enumerate(SHAPES) if own > 14]
    arrivals = [Arrival(prompt=at, step=0, tokens=ANSWER, cancel_step=None) for at in own]
    got = play(engine, one.prompts, arrivals)
    assert engine.load().preemptions > 0
    assert engine.clock.steps > ANSWER + sum(LENGTHS[at] for at in own) // 16
    assert got == [one.expected[at] for at in own]


def test_the_schedules_reach_prefix_hits(family):
    """What came before is found, but for a last token to compute; the answers stay the same."""
    one = family("llama")
    engine = engine_on(one)
    for prompt, found in ((9, 0), (5, 31), (6, 32), (8, 32), (9, 64)):
        before = engine.load().cached_tokens
        arrival = Arrival(prompt=prompt, step=0, tokens=ANSWER, cancel_step=None)
        assert play(engine, one.prompts, [arrival]) == [one.expected[prompt]]
        assert engine.load().cached_tokens - before == found


def test_another_tenant_finds_nothing(family):
    """The salt keeps equal prompts of two tenants apart."""
    one = family("llama")
    engine = engine_on(one)
    for salt, found in (("a", 0), ("b", 0), ("a", 64)):
        before = engine.load().cached_tokens
        arrival = Arrival(prompt=9, step=0, tokens=4, cancel_step=None, salt=salt)
        assert play(engine, one.prompts, [arrival]) == [one.expected[9][:4]]
        assert engine.load().cached_tokens - before == found


def test_a_window_is_shorter_than_the_prompts(family):
    """Sliding layers are exercised beyond their window, or their mask would be untested."""
    assert max(LENGTHS) > WINDOW + 16
    attentions = [
        module
        for module in family("gemma3").model.module.modules()
        if hasattr(module, "paged_layer")
    ]
    assert {module.sliding_window for module in attentions} == {WINDOW, None}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_served_says_why(tmp_path, name):
    """Refusal happens at load time and names the folder, the reason and what to do."""
    config, changes, reason = REFUSED[name]
    folder = write_model(tmp_path / name, config, changes)
    with pytest.raises(ModelRefused) as refusal:
        load_model(folder, kv_tokens=256)
    assert str(folder) in str(refusal.value)
    assert reason, "a refusal without a reason to look for tests nothing"
    assert reason in str(refusal.value)
    assert "; " in str(refusal.value), "no advice"


def test_bf16_stays_close_to_transformers_own(family, tmp_path):
    """In bf16 the packed path passes its own proof and answers in full."""
    folder = family("llama").folder
    model, _ = load_model(folder, kv_tokens=1024, dtype="bf16")
    engine = Engine(model, Tokenizer.load(folder), emit=lambda _: None)
    arrivals = [Arrival(prompt=4, step=0, tokens=8, cancel_step=None)]
    got = play(engine, family("llama").prompts, arrivals)
    assert len(got[0]) == 8
