"""Whatever guesses ahead, answers keep the target's law: all of a tiny vocabulary's answers of
three tokens are enumerated, and thousands of drawn ones are held against them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from runtime import verification
from runtime.costs import StepCosts
from runtime.draft_writer import ModelWriter, SelfWriter
from runtime.grammar import Grammars
from runtime.inbox import Order
from runtime.lark import GrammarSpec
from runtime.sequence import Sampling
from runtime.speculation import Mode, Modes, Speculation
from runtime.vocabulary import Vocabulary
from spec_decode.draft import Answer, Draft, Outlook, Proposer
from spec_decode.draft_model import DraftModel
from spec_decode.ngram import NGram
from spec_decode.prediction import Prediction
from tests.runtime.table_model import LETTERS, World, answers
from tests.runtime.test_adjust import plain_rule
from tests.runtime.test_sample import plain_filter
from tests.runtime.tiny_models import VOCAB

DRAWS = 1200
TOKENS = 3
PROMPT = "abcdabcaabdcbcda"
GRAMMAR = "(a[bc]|b[a-d]|d)[a-c]+"
COSTS = StepCosts([1, 64], [0.01, 0.02])


class Uncertain(Proposer):
    """Guesses by a law of its own that has little to do with the target's."""

    name = "uncertain"

    def __init__(self, world: World) -> None:
        self.law = torch.zeros(VOCAB)
        self.law[world.ids] = torch.tensor([0.5, 0.3, 0.2, 0.0])
        self.generator = torch.Generator().manual_seed(0)

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        return Outlook(most)

    def propose(self, wanted: Any) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for _, count in wanted:
            ids = torch.multinomial(self.law, count, replacement=True, generator=self.generator)
            drafts.append(Draft(ids.tolist(), self.law.expand(count, -1)))
        return drafts


class Branches(Proposer):
    """Two guesses for the next place, one behind the second of them."""

    name = "tree"

    def __init__(self, world: World) -> None:
        self.ids = [world.ids[0], world.ids[1], world.ids[2]]

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        return Outlook(most)

    def propose(self, wanted: Any) -> list[Draft | None]:
        return [Draft(self.ids, parents=(-1, -1, 1)) if count >= 3 else None for _, count in wanted]


def draft_model(world: World, noise: float) -> DraftModel:
    model = world.model.like(noise, seed=7)
    return DraftModel(ModelWriter(model, model.blocks, COSTS, Vocabulary(VOCAB)))


PROPOSERS: dict[str, Callable[[World], Proposer]] = {
    "ngram": lambda _: NGram(),
    "prediction": lambda _: Prediction(),
    "draft": lambda world: draft_model(world, 0.8),
    "self": lambda world: DraftModel(
        SelfWriter(world.model, world.model.blocks, COSTS, Vocabulary(VOCAB)), "self"
    ),
    "uncertain": Uncertain,
}
OPTIONS: dict[str, Sampling] = {
    "temperature 1": Sampling(),
    "temperature 0.6": Sampling(temperature=0.6),
    "top_k": Sampling(top_k=2),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.3),
    "penalties": Sampling(
        presence_penalty=0.5, frequency_penalty=1.0, repetition_penalty=1.4, temperature=1.2
    ),
    "bias": Sampling(logit_bias=((97, 1.0), (98, -2.0))),
    "grammar": Sampling(),
    "all": Sampling(temperature=1.3, top_k=3, top_p=0.95, min_p=0.02, frequency_penalty=0.7),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("table"))


def option(world: World, name: str) -> Sampling:
    one = replace(OPTIONS[name], max_tokens=TOKENS)
    if name == "bias":
        one = replace(one, logit_bias=((world.ids[0], 1.0), (world.ids[1], -2.0)))
    if name == "grammar":
        grammars = Grammars(world.tokenizer, VOCAB)
        one = replace(one, grammar=grammars.compile(GrammarSpec("regex", GRAMMAR)))
    return one


def joint(world: World, one: Sampling) -> dict[str, float]:
    """The probability of each answer, by the documented rules, a token at a time."""
    whole = {"": 1.0}
    prompt = world.encode(PROMPT)
    for _ in range(TOKENS):
        longer: dict[str, float] = {}
        for text, before in whole.items():
            answer = world.encode(text)
            row = [-1e30] * VOCAB
            for token, logit in zip(
                world.ids, world.model.logits_behind(*(prompt + answer)[-2:]), strict=True
            ):
                row[token] = logit
            row = plain_rule(row, one, prompt, answer)
            if one.grammar is not None:
                for letter, token in zip(LETTERS, world.ids, strict=True):
                    if not any(
                        re.fullmatch(GRAMMAR, text + letter + "".join(rest))
                        for size in range(3)
                        for rest in itertools.product(LETTERS, repeat=size)
                    ):
                        row[token] = -1e30
            row = [row[token] for token in world.ids]
            for letter, p in zip(LETTERS, plain_filter(row, one), strict=True):
                if p > 0:
                    longer[text + letter] = before * p
        whole = longer
    assert math.isclose(sum(whole.values()), 1.0, abs_tol=1e-6)
    return whole


def drawn(world: World, proposer: Proposer, one: Sampling, **order: Any) -> Counter[str]:
    speculation = Speculation([proposer], Modes(Mode(proposer.name, 3)))
    engine = world.engine(speculation, max_waiting=10**6)
    prompts = [world.encode(PROMPT)] * DRAWS
    said = answers(engine, prompts, [one] * DRAWS, **order)
    assert speculation.counts.guessed > DRAWS / 4, "hardly anything was guessed"
    assert speculation.counts.accepted > 0
    return Counter(world.decode(one[:TOKENS]) for one in said)


def misfit(seen: Counter[str], expected: dict[str, float]) -> tuple[float, float]:
    """p-value of chi-square over cells that expect five draws, rarer ones together; total
    variation."""
    total = seen.total()
    assert set(seen) <= set(expected), "an answer that cannot be"
    often = [one for one, p in expected.items() if p * total >= 5]
    rare = 1 - sum(expected[one] for one in often)
    counts = [seen[one] for one in often]
    wanted = [expected[one] * total for one in often]
    if rare * total >= 1:
        counts.append(total - sum(counts))
        wanted.append(rare * total)
    else:
        scale = sum(counts) / sum(wanted)
        wanted = [one * scale for one in wanted]
    apart = sum(abs(seen[one] / total - p) for one, p in expected.items()) / 2
    return float(stats.chisquare(counts, wanted).pvalue), apart


def noise_floor(expected: dict[str, float]) -> float:
    """Total variation that draws from the law itself stay below: mean and some deviations of it."""
    spread = [math.sqrt(p * (1 - p) / DRAWS) for p in expected.values()]
    return 0.4 * sum(spread) + 2.5 * math.sqrt(sum(one * one for one in spread)) / 2


FEW = ("temperature 1", "penalties", "grammar", "all")
CASES = [
    (proposer, name)
    for proposer in PROPOSERS
    for name in OPTIONS
    if name in FEW or proposer in ("draft", "uncertain")
]


@pytest.mark.parametrize(("proposer", "name"), CASES)
def test_the_joint_law_of_three_tokens_is_the_targets(world, proposer, name):
    """Chi-square and total variation over 1,200 answers: each way of guessing, each option."""
    one = option(world, name)
    order = {"prediction": world.encode("bcd")} if proposer == "prediction" else {}
    seen = drawn(world, PROPOSERS[proposer](world), one, **order)
    expected = joint(world, one)
    pvalue, apart = misfit(seen, expected)
    assert pvalue > 1e-4
    assert apart < noise_floor(expected)


def test_a_tree_of_guesses_keeps_the_law_too(world):
    """Two candidates for one place, one of them with a guess behind it."""
    one = option(world, "temperature 1")
    seen = drawn(world, Branches(world), replace(one, max_tokens=2 * TOKENS))
    pvalue, apart = misfit(seen, joint(world, one))
    assert pvalue > 1e-4
    assert apart < noise_floor(joint(world, one))


def accepting_at_q(
    target: torch.Tensor,
    drafted: torch.Tensor,
    guesses: Sequence[Sequence[int]],
    uniforms: Sequence[float],
) -> tuple[list[int], list[int]]:
    """The planted bug: a guess passes with its own law's probability instead of min(1, p / q)."""
    accepted, last = [], []
    row = at = 0
    for one in guesses:
        count = 0
        while count < len(one) and uniforms[row + count] < drafted[at + count, one[count]]:
            count += 1
        law = target[row + count]
        if count < len(one):
            law = (law - drafted[at + count]).clamp(min=0)
        accepted.append(count)
        sums = (law / law.sum()).cumsum(0)
        point = torch.tensor(uniforms[row + len(one)])
        last.append(min(int(torch.searchsorted(sums, point, right=True)), VOCAB - 1))
        row, at = row + len(one) + 1, at + len(one)
    return accepted, last


@pytest.mark.parametrize("proposer", ["draft", "uncertain"])
def test_a_wrong_rule_of_acceptance_is_caught(world, proposer, monkeypatch):
    """The tests above have teeth: with a planted bug they fail by orders of magnitude."""
    monkeypatch.setattr(verification, "judge", accepting_at_q)
    one = option(world, "temperature 1")
    pvalue, apart = misfit(drawn(world, PROPOSERS[proposer](world), one), joint(world, one))
    assert pvalue < 1e-12
    assert apart > noise_floor(joint(world, one))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_seed_gives_the_same_tokens_whatever_is_guessed(world, name):
    """The n-th token is drawn by the n-th number of the seed, with any proposer and with none."""
    prompts = [world.encode(PROMPT[at:]) for at in range(12)]
    samplings = [
        replace(option(world, name), seed=seed, max_tokens=9) for seed in range(len(prompts))
    ]
    order = {"prediction": world.encode("bcdab")}
    plain = answers(world.engine(), prompts, samplings, **order)
    for proposer in ("ngram", "prediction", "draft", "self"):
        for most in (1, 4):
            speculation = Speculation([PROPOSERS[proposer](world)], Modes(Mode(proposer, most)))
            assert answers(world.engine(speculation), prompts, samplings, **order) == plain
            assert speculation.counts.guessed > 0


@pytest.mark.parametrize("name", ["penalties", "bias", "grammar"])
def test_greedy_answers_are_the_same_token_for_token(world, name):
    """At temperature 0 with penalties, bias and grammars, for every proposer."""
    prompts = [world.encode(PROMPT[at:]) for at in range(12)]
    samplings = [replace(option(world, name), temperature=0.0, max_tokens=20)] * len(prompts)
    order = {"prediction": world.encode("bcdab")}
    plain = answers(world.engine(), prompts, samplings, **order)
    for proposer, make in PROPOSERS.items():
        if proposer == "uncertain":
            continue  # it draws its guesses from a law, for answers that are drawn
        speculation = Speculation([make(world)], Modes(Mode(proposer, 5)))
        assert answers(world.engine(speculation), prompts, samplings, **order) == plain
        assert speculation.counts.guessed > 0


def test_the_targets_own_draft_is_always_right(world):
    """A draft that says what the target says is accepted to the last token, drawn or not."""
    prompts = [world.encode(PROMPT)] * 8
    for one in (Sampling(max_tokens=13), Sampling(temperature=0, max_tokens=13), Sampling(seed=3)):
        speculation = Speculation([draft_model(world, 0.0)], Modes(Mode("draft", 3)))
        answers(world.engine(speculation), prompts, [replace(one, max_tokens=13)] * 8)
        assert speculation.counts.accepted == speculation.counts.guessed > 0


def test_logprobs_are_the_targets(world):
    """Each token comes with what the target itself says of it, alternatives too."""
    one = Sampling(temperature=0.9, seed=5, max_tokens=12, logprobs=2)
    entries = []
    for speculation in (None, Speculation([draft_model(world, 0.5)], Modes(Mode("draft", 3)))):
        engine = world.engine(speculation)
        engine.submit([Order(world.encode(PROMPT), one)])
        engine.take_orders(wait=False)
        mine = []
        while engine.load().running or engine.load().waiting:
            for output in engine.step():
                mine += output.logprobs
        entries.append(mine)
    assert entries[0] == entries[1]
    assert len(entries[0]) == 12
