"""All at once: prefixes found, preemption, tiers, chunks, adapters, fused layers, scored prompts,
random neighbours, classes, cancels, compiled steps, guesses by every proposer. No greedy answer
differs from `generate` on merged weights.
"""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from cache.disk import DiskTier
from cache.tiers import MemoryTier, Tiers
from runtime import loading
from runtime.costs import StepCosts
from runtime.draft_writer import ModelWriter, SelfWriter
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.self_model import LayersModel
from runtime.sequence import Sampling, Service
from runtime.speculation import Mode, Modes, Speculation
from runtime.surgery import FusedSlice
from runtime.swap import Swap
from runtime.tally import Tally
from runtime.vocabulary import Vocabulary
from spec_decode.draft import Answer, Draft, Outlook, Proposer
from spec_decode.draft_model import DraftModel
from spec_decode.ngram import NGram
from tests.runtime.test_adapters import ANSWER, Case

EXAMPLES = int(os.environ.get("HEADGATE_ORACLE_EXAMPLES", "0"))
TARGETS = {
    "llama": {"one": ("q_proj", "v_proj"), "two": ("o_proj", "up_proj", "down_proj")},
    "gemma2": {"one": ("k_proj", "gate_proj"), "two": ("q_proj", "o_proj")},
    "qwen2": {"one": ("q_proj", "k_proj", "v_proj"), "two": ("down_proj",)},
}
# Loading is declared cheap against computing, so that tiers are used whenever they can be.
DEAR_STEPS = StepCosts([1, 64], [0.5, 30.0])
KINDS = ("greedy", "greedy", "greedy", "random", "scored")


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    adapter: str | None
    kind: str
    priority: int
    cancel_step: int | None

    @property
    def sampling(self) -> Sampling:
        if self.kind == "random":
            return Sampling(temperature=1.0, top_p=0.9, seed=1, max_tokens=ANSWER, ignore_eos=True)
        scored = {"logprobs": 1, "prompt_logprobs": True} if self.kind == "scored" else {}
        return Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True, **scored)


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        prompt=st.integers(0, 3),
        adapter=st.sampled_from([None, "one", "two"]),
        kind=st.sampled_from(KINDS),
        priority=st.sampled_from([0, 0, -1, 2]),
        cancel_step=st.one_of(st.none(), st.none(), st.integers(0, 40)),
    ),
    min_size=1,
    max_size=10,
)
schedules = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([7, 9, 14, 128]),
        "step_tokens": st.sampled_from([16, 19, 64, 512]),
        "max_sequences": st.integers(1, 9),
        "host_blocks": st.sampled_from([0, 3, 50]),
        "disk": st.booleans(),
        "guesses": st.one_of(
            st.none(),
            st.tuples(
                st.sampled_from(["ngram", "prediction", "draft", "self", "tree", "auto"]),
                st.sampled_from([1, 3, 7, 15]),
            ),
        ),
        "forget_step": st.one_of(st.none(), st.integers(0, 30)),
    }
)


@pytest.fixture(scope="module", params=[*TARGETS, "llama compiled", "qwen2 compiled"])
def case(request, tmp_path_factory) -> Case:
    family, *more = request.param.split()
    folder = tmp_path_factory.mktemp(family)
    if not more:
        return Case(folder, family, TARGETS[family])
    library = request.getfixturevalue("native_library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_library", lambda: library)
        case = Case(folder, family, TARGETS[family], compiles=True)
    assert case.model.decoder is not None
    return case


def swap_of(case: Case, folder, host_blocks: int, disk: bool) -> Swap:
    size = case.model.block_bytes
    lower = None
    if disk:
        lower = DiskTier(
            folder, limit_bytes=200 * (size + 4096), block_bytes=size, identity={"model": "tiny"}
        )
    swap = Swap(case.model, Tiers(MemoryTier(host_blocks * size), lower), costs=DEAR_STEPS)
    swap.measure()
    return swap


class Half(Proposer):
    """Guesses what is right half of the time, so that guesses are taken back in mid-block."""

    name = "prediction"

    def __init__(self, case: Case) -> None:
        self.expected = case.expected
        self.rng = random.Random(0)

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        return Outlook(most, trust=most)

    def propose(self, wanted) -> list[Draft | None]:
        return [self.guess(answer, most) for answer, most in wanted]

    def guess(self, answer: Answer, most: int) -> Draft:
        at = len(answer.tokens) - answer.prompt_tokens
        mine = next(
            said
            for said, prompt in zip(self.expected[answer.adapter], self.prompts, strict=True)
            if prompt == answer.tokens[: answer.prompt_tokens]
        )
        right = [*mine[at:], *[0] * most][:most]
        return Draft([token if self.rng.random() < 0.8 else 5 for token in right])


class Branches(Half):
    """The same among wrong ones, as a tree: what is right stands strewn about in it."""

    name = "tree"

    def guess(self, answer: Answer, most: int) -> Draft:
        right = super().guess(answer, max(1, most // 2)).ids
        ids: list[int] = []
        parents: list[int] = []
        above = -1
        for token in right:
            if len(ids) + 1 < most:
                ids.append((token + 1) % 256)
                parents.append(above)
            parents.append(above)
            above = len(ids)
            ids.append(token)
        return Draft(ids, parents=tuple(parents))


def speculation_of(case: Case, guesses: tuple[str, int] | None) -> Speculation | None:
    """Every way of guessing; draft and self are the model once more, without its adapters."""
    if guesses is None:
        return None
    name, most = guesses
    same = Vocabulary(case.model.vocab_size)
    windows = any(case.model.windows)  # no trees there
    half: Half = Branches(case) if name == "tree" and not windows else Half(case)
    half.prompts = case.prompts
    writer = ModelWriter(case.twin, case.twin.blocks, copy.deepcopy(DEAR_STEPS), same)
    fewer = SelfWriter(
        LayersModel(case.model, [0, 1, 2]), case.model.blocks, copy.deepcopy(DEAR_STEPS), same
    )
    own = DraftModel(fewer, "self") if name == "self" else DraftModel(writer)
    return Speculation([half, NGram(), own], Modes(Mode(name, most)))


@settings(max_examples=EXAMPLES or 10, deadline=None, derandomize=not EXAMPLES)
@given(arrivals=arrivals, schedule=schedules)
def test_no_greedy_answer_ever_changes(case, tmp_path_factory, arrivals, schedule):
    """Whatever is switched on beside it, each answer is what its adapter says to its prompt."""
    case.model.blocks = schedule["blocks"]
    folder = tmp_path_factory.mktemp("disk")
    swap = swap_of(case, folder, schedule["host_blocks"], schedule["disk"])
    limits = {name: schedule[name] for name in ("step_tokens", "max_sequences")}
    tally = Tally(case.model.context_tokens)
    engine = Engine(
        case.model,
        case.tokenizer,
        emit=lambda _: None,
        adapters=case.adapters,
        listeners=[tally],
        swap=swap,
        speculation=speculation_of(case, schedule["guesses"]),
        **limits,
    )
    try:
        answers = play(engine, case, arrivals, schedule["forget_step"])
    finally:
        swap.close()
    assert not any(tally.violations.values())
    for at, arrival in enumerate(arrivals):
        expected = case.expected[arrival.adapter][arrival.prompt]
        if arrival.kind != "random":
            assert answers[at] == expected[: len(answers[at])]
        if arrival.cancel_step is None:
            assert len(answers[at]) == ANSWER
    counts = engine.load().blocks
    assert (counts.free + counts.cached, counts.in_use) == (counts.total, 0)
    engine.check()


def play(engine: Engine, case: Case, arrivals: list[Arrival], forget_step: int | None):
    """Runs a schedule step by step; the tokens that each arrival got."""
    keys: dict[int, int] = {}
    got: list[list[int]] = [[] for _ in arrivals]
    step = 0
    while len(keys) < len(arrivals) or engine.load().running or engine.load().waiting:
        for at, arrival in enumerate(arrivals):
            if arrival.step == step:
                order = Order(
                    case.prompts[arrival.prompt],
                    arrival.sampling,
                    Service(arrival.priority),
                    adapter=arrival.adapter,
                )
                keys[engine.submit([order])[0]] = at
            if arrival.cancel_step == step:
                engine.cancel([key for key, number in keys.items() if number == at])
        if step == forget_step:
            engine.forget_cached()
        engine.take_orders(wait=False)
        for output in engine.step():
            assert output.error is None, output.error
            got[keys[output.key]] += output.token_ids
        step += 1
        assert step < 5000, "the schedule does not end"
    return got


@pytest.mark.parametrize("name", ["ngram", "prediction", "draft", "self", "tree"])
def test_guesses_are_really_accepted_and_refused(case, name):
    """The property above is not vacuous: each proposer is right at times, and wrong at times, but
    for answers that were given before."""
    if name == "tree" and any(case.model.windows):
        pytest.skip("trees do not go with sliding windows")
    case.model.blocks = 128
    speculation = speculation_of(case, (name, 3))
    engine = Engine(
        case.model,
        case.tokenizer,
        emit=lambda _: None,
        adapters=case.adapters,
        speculation=speculation,
    )
    wave = [
        Arrival(0, prompt, adapter, "greedy", 0, None)
        for prompt in range(4)
        for adapter in (None, "one")
    ]
    # An answer is remembered, so that a second wave finds it.
    for _ in range(2):
        answers = play(engine, case, wave, None)
        assert answers == [case.expected[one.adapter][one.prompt] for one in wave]
    assert speculation.counts.accepted > 0
    assert name == "ngram" or speculation.counts.accepted < speculation.counts.guessed


def test_fusion_preemption_and_tiers_are_really_on(case, tmp_path):
    """The property above is not vacuous: layers are fused, sequences give way, blocks come back."""
    assert any(isinstance(module, FusedSlice) for module in case.model.module.modules())
    case.model.blocks = 7
    swap = swap_of(case, tmp_path, 50, disk=False)
    engine = Engine(
        case.model, case.tokenizer, emit=lambda _: None, adapters=case.adapters, swap=swap
    )
    wave = [
        Arrival(step + urgent, 2 - urgent, name, "greedy", -urgent, None)
        for step in (0, 40)
        for name in (None, "one", "two")
        for urgent in (0, 1)
    ]
    answers = play(engine, case, wave, None)
    swap.close()
    assert answers == [case.expected[one.adapter][one.prompt] for one in wave]
    assert engine.load().preemptions > 0
    assert swap.tiers.counts()["host"].loaded > 0
