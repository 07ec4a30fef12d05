"""One model in several formats of weights and KV: what each answers, thinks, and costs.

Imports torch, so that only those who measure formats import this module, and late.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Literal

import torch

from benchmarks.lab.engine_steps import decoding
from cache.tokens import Tokenizer
from command.machine import cores
from pocket.tasks import Row
from policies.schema import Weights
from runtime.attention import Span, lay_out
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.kv import blocks_for
from runtime.loading import load_model
from runtime.model import Model
from runtime.sequence import Output, Sampling

_ANSWER_TOKENS = 96
_KV_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Variant:
    """A model's formats, as a policy names them."""

    weights: Weights
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    kv: Literal["auto", "int8"] = "auto"
    compiles: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Model
    tokenizer: Tokenizer

    @property
    def held(self) -> str:
        """How the layers are held: `w8a8-fbgemm 24, fp32 1`."""
        return ", ".join(f"{name} {count}" for name, count in self.model.weights.held.items())


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second by the clock, and processor time."""

    tokens_per_s: float
    cpu_ms_per_token: float


def load(folder: Path, variant: Variant) -> Loaded:
    """On the CPU, with as many threads as a single worker takes."""
    torch.set_num_threads(cores())
    model, folder = load_model(
        folder,
        kv_tokens=_KV_TOKENS,
        device="cpu",
        dtype=variant.dtype,
        weights=variant.weights,
        kv=variant.kv,
        compiles=variant.compiles,
    )
    return Loaded(model, Tokenizer.load(folder))


def prompt_of(loaded: Loaded, row: Row) -> list[int]:
    return loaded.tokenizer.encode_chat(row.messages, tools=row.tools)


def answers(loaded: Loaded, rows: Many[Row]) -> list[str]:
    """What the model writes for each row, greedy, to its natural end."""
    greedy = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS)
    engine = Engine(loaded.model, loaded.tokenizer, emit=lambda _: None)
    keys = engine.submit([Order(prompt_of(loaded, row), greedy) for row in rows])
    engine.take_orders(wait=False)
    texts = dict.fromkeys(keys, "")
    while engine.load().running or engine.load().waiting:
        for output in engine.step():
            texts[output.key] += output.text
    return [texts[key] for key in keys]


@dataclass(frozen=True, slots=True)
class Given:
    """A row's prompt with its right answer behind it."""

    prompt: list[int]
    answer: list[int]


def given(loaded: Loaded, row: Row) -> Given:
    ended = min(loaded.tokenizer.eos_ids)
    return Given(
        prompt_of(loaded, row), [*loaded.tokenizer.encode(row.answer, special=False), ended]
    )


@torch.inference_mode()
def logprobs(loaded: Loaded, rows: Many[Given]) -> torch.Tensor:
    """Log-probabilities [A, V] at each token of the answers, given those before it, in one step."""
    model, ids, positions = loaded.model, list[int](), list[int]()
    spans, keep, used = list[Span](), list[int](), 0
    for one in rows:
        own = (one.prompt + one.answer)[:-1]
        blocks = blocks_for(len(own))
        spans.append(Span(len(own), len(own), list(range(used, used + blocks))))
        keep += range(len(ids) + len(one.prompt) - 1, len(ids) + len(own))
        ids += own
        positions += range(len(own))
        used += blocks
    layout = lay_out(spans, model.device, model.scratch_slot)
    return model.forward(ids, positions, layout, keep).float().log_softmax(-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each row, [A] in nats; both are log-probabilities [A, V]."""
    return (reference.exp() * (reference - other)).sum(-1)


def decode_speed(loaded: Loaded, prompts: Many[list[int]], tokens: int) -> Speed:
    """All sequences decode in each step that is timed: prefill is in none."""
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine = decoding(loaded.model, loaded.tokenizer, prompts, sampling)
    made, outputs = 0, list[Output]()
    wall, cpu = perf_counter(), process_time()
    while not any(output.finish_reason for output in outputs):
        outputs = engine.step()
        made += len(outputs)
    return Speed(made / (perf_counter() - wall), (process_time() - cpu) * 1e3 / made)


def prefill_speed(loaded: Loaded, prompt: list[int]) -> Speed:
    """One prompt in one step."""
    model = loaded.model
    span = Span(len(prompt), len(prompt), list(range(blocks_for(len(prompt)))))
    layout = lay_out([span], model.device, model.scratch_slot)
    wall, cpu = perf_counter(), process_time()
    model.forward(prompt, list(range(len(prompt))), layout, [len(prompt) - 1])
    seconds = perf_counter() - wall
    return Speed(len(prompt) / seconds, (process_time() - cpu) * 1e3 / len(prompt))
