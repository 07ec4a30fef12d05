"""Guesses in the engine: where they end, what they cost, who makes them, what is told of them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cache.tokens import Tokenizer
from policies.schema import Runtime
from runtime.costs import StepCosts
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.kv import BLOCK_TOKENS, BlockPool, blocks_for
from runtime.loading import load_model
from runtime.model import ModelRefused
from runtime.proposers import open_speculation
from runtime.scheduler import Scheduler
from runtime.sequence import Sampling, Service
from runtime.speculation import Mode, Modes, Speculation
from runtime.tally import Tally
from runtime.vocabulary import VocabulariesDiffer, vocabulary_of
from spec_decode.draft import Answer, Draft, Outlook, Proposer
from spec_decode.draft_model import DraftModel
from spec_decode.ngram import NGram
from spec_decode.prediction import Prediction
from spec_decode.synthetic import Synthetic
from tests.runtime.table_model import World, answers
from tests.runtime.test_metrics import samples
from tests.runtime.test_scheduler import sequence
from tests.runtime.test_server import CHAT, HELLO, serving
from tests.runtime.test_speculation_law import draft_model
from tests.runtime.tiny_models import FAMILIES, write_model

GREEDY = Sampling(temperature=0, max_tokens=24)
LOOP = "abcabcabcabc"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Greedy answers of this table run in a loop, so that guesses are often right."""
    return World(tmp_path_factory.mktemp("table"), seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


def always(proposer: Proposer, most: int = 4) -> Speculation:
    return Speculation([proposer], Modes(Mode(proposer.name, most)))


class Counted(Proposer):
    """Guesses the same token again and again, and counts how often it is asked."""

    name = "counted"

    def __init__(self, token: int) -> None:
        self.token = token
        self.looks = 0

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        self.looks += 1
        return Outlook(most)

    def propose(self, wanted: Any) -> list[Draft | None]:
        return [Draft([self.token] * count) for _, count in wanted]


# ---- where answers end --------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 15])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_no_answer_is_longer_than_it_may_be(world, most, max_tokens):
    """Guesses behind the last token are not even made."""
    one = Sampling(temperature=0, max_tokens=max_tokens)
    plain = answers(world.engine(), [world.encode(LOOP)], [one])
    speculation = always(draft_model(world, 0.0), most)
    assert answers(world.engine(speculation), [world.encode(LOOP)], [one]) == plain
    assert len(plain[0]) == max_tokens
    assert speculation.counts.accepted == speculation.counts.guessed <= max_tokens


def text_of(engine: Engine, order: Order) -> tuple[str, str | None, int]:
    engine.submit([order])
    engine.take_orders(wait=False)
    text, reason, tokens = "", None, 0
    while engine.load().running or engine.load().waiting:
        for output in engine.step():
            text, reason = text + output.text, output.finish_reason
            tokens += len(output.token_ids)
    engine.check()
    return text, reason, tokens


def test_a_stop_string_inside_accepted_guesses_ends_the_answer_there(world):
    """What was accepted behind it is dropped, as it would never have been said."""
    plain, _, _ = text_of(world.engine(), Order(world.encode(LOOP), GREEDY))
    stop = plain[5:8]
    one = Sampling(temperature=0, max_tokens=24, stop=(stop,))
    expected = text_of(world.engine(), Order(world.encode(LOOP), one))
    assert expected[1] == "stop"
    for most in (2, 5, 15):
        engine = world.engine(always(draft_model(world, 0.0), most))
        assert text_of(engine, Order(world.encode(LOOP), one)) == expected


@pytest.mark.parametrize("most", [2, 5, 15])
def test_guesses_that_nobody_got_count_alike_everywhere(world, most):
    """Right ones behind the end of an answer were accepted in the counters of speculation, by place
    too, and rejected in usage and ledger."""
    plain, _, _ = text_of(world.engine(), Order(world.encode(LOOP), GREEDY))
    one = Sampling(temperature=0, max_tokens=24, stop=(plain[5:8],))
    speculation, tally = always(draft_model(world, 0.0), most), Tally(4096)
    answers(world.engine(speculation, listeners=[tally]), [world.encode(LOOP)] * 3, [one] * 3)
    counts, stages = speculation.counts, tally.stages
    assert not any(tally.violations.values())
    assert (counts.guessed, counts.accepted) == (stages["drafted"], stages["accepted"])
    assert sum(counts.accepted_at) == counts.accepted > 0
    name = speculation.proposers[0].name
    wrong = counts.guessed - counts.accepted
    assert counts.by_proposer == {(name, "accepted"): counts.accepted, (name, "rejected"): wrong}


def test_an_end_token_inside_accepted_guesses_ends_the_answer_there(world):
    """The same for a token that ends it."""
    token = answers(world.engine(), [world.encode(LOOP)], [GREEDY])[0][6]
    one = Sampling(temperature=0, max_tokens=24, stop_ids=frozenset([token]))
    expected = text_of(world.engine(), Order(world.encode(LOOP), one))
    engine = world.engine(always(draft_model(world, 0.0), 15))
    assert text_of(engine, Order(world.encode(LOOP), one)) == expected


def test_nothing_is_guessed_behind_a_guess_that_ends_the_answer(world):
    """A draft that knows the end writes no further, and what others guess there is cut off; with
    another end the same guesses go on."""
    token = answers(world.engine(), [world.encode(LOOP)], [GREEDY])[0][6]
    one = Sampling(temperature=0, max_tokens=24, stop_ids=frozenset([token]))
    speculation = always(draft_model(world, 0.0), 15)
    answers(world.engine(speculation), [world.encode(LOOP)], [one])
    assert speculation.counts.guessed == speculation.counts.accepted > 0
    for ends, each in ((one, 1), (GREEDY, 4)):
        speculation = always(Counted(token), 4)
        answers(world.engine(speculation), [world.encode(LOOP)], [ends])
        assert max(each - 1, 1) <= speculation.counts.guessed / speculation.counts.drafts <= each


def test_blocks_of_accepted_guesses_are_found_by_others_and_of_refused_ones_are_not(world):
    """The table model trips over a block that holds anything but its tokens."""
    prompts = [world.encode(LOOP * 2)]
    one = Sampling(temperature=0, max_tokens=60)
    plain = answers(world.engine(), prompts, [one])[0]
    for proposer in (draft_model(world, 1.0), Counted(world.ids[0])):
        engine = world.engine(always(proposer, 7))
        assert answers(engine, prompts, [one])[0] == plain
        whole = prompts[0] + plain
        again = Order(whole[:-1], Sampling(temperature=0, max_tokens=1))
        engine.submit([again])
        engine.take_orders(wait=False)
        output = engine.step()[-1]
        assert list(output.token_ids) == whole[-1:]
        assert (
            output.cached_tokens >= (len(whole) - 1) // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS
        )


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(5, 14),
    most=st.sampled_from([1, 4, 15]),
    step_tokens=st.sampled_from([16, 24, 200]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    noise=st.sampled_from([0.0, 0.7]),
)
def test_guesses_never_change_an_answer_however_small_the_pool(
    world, blocks, most, step_tokens, lengths, noise
):
    """With preemption and budgets that leave no room for guesses; and every sequence ends."""
    model = world.model.like(0.0, seed=1)
    model.blocks, model.scratch_slot = blocks, blocks * BLOCK_TOKENS
    small = World.__new__(World)
    small.tokenizer, small.ids, small.model = world.tokenizer, world.ids, model
    prompts = [world.encode((LOOP * 4)[at : at + size]) for at, size in enumerate(lengths)]
    samplings = [Sampling(temperature=0, max_tokens=20)] * len(prompts)
    plain = answers(world.engine(), prompts, samplings)
    speculation = always(draft_model(small, noise), most)
    engine = small.engine(speculation, step_tokens=step_tokens)
    assert answers(engine, prompts, samplings) == plain
    assert not speculation._kinds


@given(
    blocks=st.integers(2, 12),
    others=st.integers(0, 3),
    tokens=st.integers(1, 60),
    guesses=st.integers(1, 15),
)
def test_nobody_gives_way_for_a_guess(blocks, others, tokens, guesses):
    """Room is only what nobody else may need next; what is promised is there."""
    pool = BlockPool(blocks)
    scheduler = Scheduler(pool, step_tokens=512, max_sequences=8)
    mine = sequence(0, min(tokens, blocks * BLOCK_TOKENS - 1))
    for one in (mine, *(sequence(key, 2) for key in range(1, 1 + others))):
        scheduler.add(one)
    running = {work.sequence.key for work in scheduler.plan()}
    if 0 not in running:
        return
    mine.computed = len(mine.tokens)
    before, available = len(mine.blocks), pool.available
    room = scheduler.look_ahead(mine, guesses)
    assert 0 <= room <= guesses
    assert len(mine.blocks) >= blocks_for(len(mine.tokens) + room)
    assert scheduler.preemptions == 0
    assert len(mine.blocks) == before or pool.available >= len(running)
    assert available - pool.available == len(mine.blocks) - before
    pool.check()


@pytest.mark.parametrize(("step_tokens", "scored_rows"), [(64, 9), (9, 64)])
def test_a_named_proposer_guesses_no_more_than_a_step_has_room_for(world, step_tokens, scored_rows):
    """Four answers with five guesses each would be 24 rows of logits."""
    scheduler = Scheduler(
        BlockPool(64), step_tokens=step_tokens, max_sequences=8, scored_rows=scored_rows
    )
    for key in range(4):
        scheduler.add(sequence(key, 2))
    for work in scheduler.plan():
        work.sequence.computed = 2
        work.sequence.tokens.append(world.ids[0])
    plan = scheduler.plan()
    assert [work.count for work in plan] == [1] * 4
    extended = always(Counted(world.ids[0]), 5).extend(plan, scheduler)
    assert sum(work.count for work in extended) == 9
    assert sorted(work.sequence.key for work in extended) == [0, 1, 2, 3]


# ---- when to guess ------------------------------------------------------------------------------


def test_auto_stops_looking_where_guesses_are_never_right(world):
    """Where a look takes as long as a step, most steps do not look, and answers are what they
    were."""
    token = next(one for one in world.ids if one not in set(answers_of(world)))
    proposer = Counted(token)
    ticks = itertools.count()
    speculation = Speculation([proposer], Modes(Mode("auto", 4)), timer=lambda: float(next(ticks)))
    one = Sampling(temperature=0, max_tokens=150)
    plain = answers(world.engine(), [world.encode(LOOP)], [one])
    assert answers(world.engine(speculation), [world.encode(LOOP)], [one]) == plain
    assert speculation.counts.accepted == 0
    assert proposer.looks < 40
    assert speculation.counts.rested > 100


def answers_of(world: World) -> list[int]:
    return answers(world.engine(), [world.encode(LOOP)], [Sampling(temperature=0, max_tokens=150)])[
        0
    ]


def test_auto_guesses_where_it_pays_and_not_where_every_token_costs(world):
    """One table of costs in which verifying is nearly free, one in which each token is paid."""
    cheap = StepCosts([1, 64], [0.010, 0.011])
    dear = StepCosts([1, 64], [0.001, 0.064])
    for costs, guesses in ((cheap, True), (dear, False)):
        speculation = Speculation([NGram()], Modes(Mode("auto", 7)), timer=lambda: 0.0)
        engine = world.engine(speculation)
        engine._scheduler.costs = costs
        engine._timer = lambda: 0.0  # nothing is learned: the table stays
        answers(engine, [world.encode(LOOP)], [Sampling(temperature=0, max_tokens=100)])
        assert (speculation.counts.accepted > 30) is guesses
        assert (speculation.counts.guessed > 30) is guesses


def test_tiers_and_models_have_guesses_of_their_own(world):
    """A tier that is off guesses nothing while its neighbour does; a name goes before a tier."""
    modes = Modes(
        Mode("counted", 2),
        tiers={"batch": Mode("off", 1), "chat": Mode("counted", 5)},
        models={"": Mode("counted", 1)},
    )
    one = sequence(0, 4)
    assert modes.of(one) == Mode("counted", 1)
    one.adapter = "other"
    assert modes.of(one) == Mode("counted", 2)
    one.service = Service(tier="batch")
    assert modes.of(one).proposer == "off"
    modes = Modes(Mode("counted", 2), tiers={"batch": Mode("off", 1)})
    for tier, guessed in (("batch", 0), ("", 2 * 8)):
        speculation = Speculation([Counted(world.ids[0])], modes)
        order = Order(world.encode(LOOP), GREEDY, Service(tier=tier))
        text_of(world.engine(speculation), order)
        assert (speculation.counts.guessed >= guessed) and bool(guessed) is bool(
            speculation.counts.guessed
        )


def test_synthetic_acceptance_gives_the_tokens_a_step_that_theory_gives(world):
    """(1 - a^(k+1)) / (1 - a), within 2 %, through the whole engine."""
    for rate, most in ((0.6, 3), (0.8, 5)):
        speculation = always(Synthetic(rate, random.Random(0), token=world.ids[0]), most)
        one = Sampling(temperature=0, max_tokens=4000)
        for _ in range(6):
            answers(world.engine(speculation), [world.encode(LOOP)], [one])
        counts = speculation.counts
        expected = (1 - rate ** (most + 1)) / (1 - rate)
        assert 1 + counts.accepted / counts.drafts == pytest.approx(expected, rel=0.02)


def test_a_draft_reads_long_prompts_in_portions_and_finds_cached_ones(world):
    """Nothing is guessed before a prompt is read; what one sequence's draft read, another has."""
    model = world.model.like(0.0, seed=2)
    model.blocks, model.scratch_slot = 256, 256 * BLOCK_TOKENS
    big = World.__new__(World)
    big.tokenizer, big.ids, big.model = world.tokenizer, world.ids, model
    proposer = draft_model(big, 0.0)
    assert isinstance(proposer, DraftModel)
    draft: Any = proposer._writer
    engine = big.engine(always(proposer, 3))
    prompt = world.encode((LOOP * 100)[:1100])
    answers(engine, [prompt], [Sampling(temperature=0, max_tokens=30)])
    read = draft._model.rows
    assert read >= 1100
    answers(engine, [prompt + world.encode("a")], [Sampling(temperature=0, max_tokens=30)])
    assert draft._model.rows - read < 150, "the prompt was read again"


# ---- what is told -------------------------------------------------------------------------------


def test_usage_and_metrics_tell_what_was_guessed(folder):
    """Over a socket: as far as a prediction is the answer it is accepted, the rest is rejected."""
    letter = Tokenizer.load(folder).encode("x", special=False)[0]
    with serving(folder, speculation=always(Prediction(), 7)) as world:
        body = {"max_tokens": 24, "logit_bias": {str(letter): 100}}
        plain = world.post(**body).json()
        assert plain["choices"][0]["message"]["content"] == 24 * "x"
        nothing = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        assert plain["usage"]["completion_tokens_details"] == nothing
        for text, accepted, rejected in (
            (24 * "x", 20, 0),  # the first comes from the prompt, three are said by the way
            (4 * "x" + "yyyy", 3, 70),  # what repeats itself is found again and again
            ("yyyy", 0, 0),  # nobody reads on in a prediction that has begun wrongly
        ):
            prediction = {"type": "content", "content": [{"type": "text", "text": text}]}
            answer = world.post(**body, prediction=prediction).json()
            assert answer["choices"] == plain["choices"]
            assert answer["usage"]["completion_tokens"] == 24
            assert answer["usage"]["completion_tokens_details"] == {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            }
        page = samples(world)
        assert page["vllm:spec_decode_num_draft_tokens_total"] == sum(
            value for name, value in page.items() if name.startswith("headgate_draft_tokens_total")
        )
        assert page["vllm:spec_decode_num_drafts_total"] == page["headgate_drafts_total"] > 0
        places = [
            value
            for name, value in page.items()
            if name.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total")
        ]
        assert sum(places) == page["vllm:spec_decode_num_accepted_tokens_total"]
        assert world.until(world.idle) is None


def test_a_prediction_of_another_kind_is_refused(folder):
    """The field is named, before anything runs, and whether anything is guessed or not."""
    with serving(folder) as world:
        for prediction, param in (
            ({"type": "audio", "content": "x"}, "prediction.type"),
            ({"type": "content", "content": 5}, "prediction.content"),
            ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content.0"),
        ):
            answer = world.post(prediction=prediction)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param


# ---- who may guess ------------------------------------------------------------------------------


def runtime(folder: Path, **speculation: Any) -> Runtime:
    return Runtime(
        model=str(folder), kv_tokens=1024, step_tokens=64, speculation=speculation, device="cpu"
    )


def opened(folder: Path, **speculation: Any):
    model, _ = load_model(folder, kv_tokens=1024)
    policy = runtime(folder, **speculation)
    draft = Path(speculation["draft"]) if "draft" in speculation else None
    made, _ = open_speculation(policy, model, Tokenizer.load(folder), draft, folder, "tiny")
    return model, made


@pytest.mark.parametrize(
    "speculation",
    [
        {"proposer": "self", "self_draft": "layers", "self_layers": 0.7},
        {"proposer": "self", "self_draft": "w8a8"},
    ],
)
def test_a_model_guesses_for_itself(folder, speculation):
    """With fewer layers, and in 8 bits, over the blocks of the target: greedy answers stay."""
    model, made = opened(folder, **speculation)
    tokenizer = Tokenizer.load(folder)
    prompts = [list(range(3, 40)), list(range(50, 53))]
    one = Sampling(temperature=0, max_tokens=30, ignore_eos=True)
    plain = answers(Engine(model, tokenizer, emit=lambda _: None), prompts, [one] * 2)
    engine = Engine(model, tokenizer, emit=lambda _: None, speculation=made)
    assert answers(engine, prompts, [one] * 2) == plain
    assert made.counts.guessed > 0
    if speculation["self_draft"] == "w8a8":
        assert made.counts.accepted > made.counts.guessed / 3


def test_a_draft_of_the_same_tokens_guesses(folder, tmp_path):
    """A smaller model of the same tokenizer, in the pool's own blocks."""
    draft = write_model(tmp_path / "draft", "LlamaConfig", {"num_hidden_layers": 1})
    model, made = opened(folder, proposer="draft", draft=str(draft))
    tokenizer = Tokenizer.load(folder)
    one = Sampling(temperature=0, max_tokens=30, ignore_eos=True)
    plain = answers(Engine(model, tokenizer, emit=lambda _: None), [[5, 6, 7]], [one])
    engine = Engine(model, tokenizer, emit=lambda _: None, speculation=made)
    assert answers(engine, [[5, 6, 7]], [one]) == plain
    assert made.counts.guessed > 0


def test_drafts_that_cannot_do_are_refused_with_the_reason(folder, tmp_path):
    """Larger than the target, for a shorter context, with other tokens: before any request."""
    large = write_model(tmp_path / "large", "LlamaConfig", {"num_hidden_layers": 5})
    with pytest.raises(ModelRefused, match="a draft has to be smaller"):
        opened(folder, proposer="draft", draft=str(large))
    small = {"num_hidden_layers": 1}
    short = write_model(tmp_path / "short", "LlamaConfig", small | {"max_position_embeddings": 64})
    with pytest.raises(ModelRefused, match="was trained for 64 tokens"):
        opened(folder, proposer="draft", draft=str(short))
    foreign = write_model(tmp_path / "foreign", "LlamaConfig", small)
    scramble(foreign / "tokenizer.json", keep=100)
    with pytest.raises(ModelRefused, match="writes with other tokens"):
        opened(folder, proposer="draft", draft=str(foreign))


def scramble(file: Path, keep: int) -> None:
    """Leaves the first tokens of a byte-level tokenizer where they are, and renames the others."""
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    for token, at in list(vocabulary.items()):
        if at >= keep:
            del vocabulary[token]
            vocabulary[token + token] = at
    file.write_text(json.dumps(data))


def test_vocabularies_are_mapped_by_what_tokens_are(folder, tmp_path):
    """A draft whose ids are another order of the same tokens: its logits come back in the
    target's order, what it lacks is impossible, and what it does not know it reads as its end."""
    target = Tokenizer.load(folder)
    write_model(tmp_path, "LlamaConfig", {"num_hidden_layers": 1})
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    turned = {token: (at + 7) % 256 for token, at in vocabulary.items()}
    lost = next(token for token, at in vocabulary.items() if at == 40)
    turned[lost + lost] = turned.pop(lost)
    data["model"]["vocab"] = turned
    file.write_text(json.dumps(data))
    mapping = vocabulary_of(target, Tokenizer.load(tmp_path), 260, 260)
    assert list(mapping.to_draft([0, 1, 255, 256])) == [7, 8, 6, 256]
    assert list(mapping.to_draft([40])) == [256]
    logits = torch.arange(260.0)[None]
    back = mapping.to_target(logits)[0]
    assert back[0] == 7
    assert back[255] == 6
    assert back[40] == -torch.inf
    same = vocabulary_of(target, target, 260, 260)
    assert same.to_target(logits) is logits
    wider = vocabulary_of(target, target, 300, 260)
    assert max(wider.to_draft([0, 299])) < 260, "the draft has no row for it"
    assert wider.to_target(logits)[0, [0, 255, 299]].tolist() == [0, 255, -torch.inf]
    with pytest.raises(VocabulariesDiffer, match="at least 80% are needed"):
        scramble(file, keep=3)
        vocabulary_of(target, Tokenizer.load(tmp_path), 260, 260)


def marked(told: str) -> tuple[list[dict[str, int]], dict[str, int]]:
    """A stream's marks, and what its usage says of the answer's tokens."""
    chunks = [json.loads(one[6:]) for one in told.split("\n\n") if one.startswith("data: {")]
    marks = [chunk["headgate"] for chunk in chunks if "headgate" in chunk]
    return marks, chunks[-1]["usage"]["completion_tokens_details"]


def test_a_stream_marks_the_tokens_that_were_guessed(folder):
    """Event by event, one token each, and in all as many as the usage tells: behind seven
    guesses comes a token of the model's own. Who does not ask for it gets not a word of it."""
    letter = Tokenizer.load(folder).encode("x", special=False)[0]
    body = HELLO | {"max_tokens": 24, "logit_bias": {str(letter): 100}, "stream": True}
    body |= {"prediction": {"type": "content", "content": 24 * "x"}}
    body |= {"stream_options": {"include_usage": True}}
    with serving(folder, speculation=always(Prediction(), 7)) as world:
        told = world.client.post(CHAT, json=body, headers={"x-headgate-marks": "1"}).text
        assert "headgate" not in world.client.post(CHAT, json=body).text
        body |= {"prediction": {"type": "content", "content": 4 * "x" + 20 * "y"}}
        wrong = world.client.post(CHAT, json=body, headers={"x-headgate-marks": "1"}).text
    marks, details = marked(told)
    assert [mark["tokens"] for mark in marks] == [1] * 24
    assert [mark["guessed"] for mark in marks] == [0, *2 * [*7 * [1], 0], *6 * [1], 0]
    assert sum(mark["guessed"] for mark in marks) == details["accepted_prediction_tokens"]
    assert not any(mark["rejected"] for mark in marks)
    marks, details = marked(wrong)
    assert sum(mark["guessed"] for mark in marks) == details["accepted_prediction_tokens"]
    assert sum(mark["rejected"] for mark in marks) == details["rejected_prediction_tokens"] > 0
