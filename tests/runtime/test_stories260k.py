"""The engine on real weights that nobody here made: a pretrained 260K-parameter Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.tokens import Tokenizer
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.sequence import Output, Sampling

SHARED = Path(__file__).parents[3] / "shared/data/models/stories260K"
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def golden():
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference outputs in {SHARED.name}, which do not ship")
    return json.loads((SHARED / "golden.json").read_text())


@pytest.fixture(scope="module")
def engine(stories260k):
    model, folder = load_model(stories260k, kv_tokens=4096)
    return Engine(model, Tokenizer.load(folder), emit=lambda _: None, step_tokens=48)


def finish(engine: Engine, orders: list[Order]) -> list[list[Output]]:
    """Runs the orders together to their end; the outputs of each."""
    keys = engine.submit(orders)
    outputs: list[Output] = []
    engine.take_orders(wait=False)
    while engine.load().running or engine.load().waiting:
        outputs += engine.step()
    return [[output for output in outputs if output.key == key] for key in keys]


def test_greedy_runs_equal_the_reference(engine, golden):
    """Eight prompts in one batch give the reference's tokens, log-probabilities and text."""
    sampling = Sampling(temperature=0, max_tokens=96, ignore_eos=True, logprobs=0)
    runs = golden["greedy"]
    answers = finish(engine, [Order(run["prompt_ids"], sampling) for run in runs])
    for run, outputs in zip(runs, answers, strict=True):
        assert [token for output in outputs for token in output.token_ids] == run["greedy_ids"]
        logprobs = [entry.logprob for output in outputs for entry in output.logprobs]
        assert logprobs == pytest.approx(run["greedy_logprobs"], abs=LOGPROB_TOLERANCE)


def test_teacher_forced_text_has_the_references_likelihood(engine, golden):
    """Prompt log-probabilities, computed in chunks, give the reference's mean loss."""
    sampling = Sampling(temperature=0, max_tokens=0, logprobs=0, prompt_logprobs=True)
    for passage in golden["teacher_forced"]:
        (outputs,) = finish(engine, [Order(passage["ids"], sampling)])
        first, *scored = [entry.logprob for output in outputs for entry in output.logprobs]
        assert first is None
        assert len(scored) == len(passage["ids"]) - 1
        assert -sum(scored) / len(scored) == pytest.approx(passage["mean_nll"], abs=1e-3)


def test_text_streams_as_the_reference_spells_it(engine, golden):
    """The streamed pieces of a story join to prompt plus continuation, spaces kept."""
    run = next(run for run in golden["greedy"] if run["prompt"] == "Zoo")
    sampling = Sampling(temperature=0, max_tokens=96, ignore_eos=True)
    (outputs,) = finish(engine, [Order(run["prompt_ids"], sampling)])
    text = "Zoo" + "".join(output.text for output in outputs)
    assert text == run["text"]
    assert text.startswith("Zoo was a little girl named Lily.")
