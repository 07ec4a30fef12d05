"""The engine alone, without a server: what a step costs beyond the model's forward.

Imports torch, so that only those who measure the engine import this module, and late.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from cache.tokens import Tokenizer
from command.machine import cores
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.model import Model
from runtime.sequence import Output, Sampling


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as a worker loads it."""

    model: Model
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of all sequences, in microseconds."""

    overhead_us: float  # step - forward: plan, lay out, sample, detokenize
    forward_us: float
    outside_us: float  # between steps: orders and cancellations taken


def load(folder: Path) -> Loaded:
    """On the CPU, with as many threads as a single worker takes.

    Never on another device: there a forward returns before it is done, and its end would count as
    overhead.
    """
    torch.set_num_threads(cores())
    model, folder = load_model(folder, kv_tokens=32768, device="cpu")
    return Loaded(model, Tokenizer.load(folder))


def decoding(
    model: Model, tokenizer: Tokenizer, prompts: Many[list[int]], sampling: Sampling
) -> Engine:
    """An engine in which every prompt has got its first token, and nothing else runs."""
    engine = Engine(model, tokenizer, emit=lambda _: None)
    keys = set(engine.submit([Order(prompt, sampling) for prompt in prompts]))
    engine.take_orders(wait=False)
    begun: set[int] = set()
    while begun != keys:
        begun |= {output.key for output in engine.step() if output.token_ids}
    return engine


def decode_steps(loaded: Loaded, prompts: Many[list[int]], sampling: Sampling) -> list[Step]:
    """The steps from the last sequence's first token to the first sequence's last one.

    All sequences decode in each of them, so prefill is in none.
    """
    engine = decoding(loaded.model, loaded.tokenizer, prompts, sampling)
    steps = []
    outputs: list[Output] = []
    while not any(output.finish_reason for output in outputs):
        clock = engine.clock
        step_s, forward_s, started = clock.step_s, clock.forward_s, perf_counter()
        engine.take_orders(wait=False)
        outputs = engine.step()
        whole_us = (perf_counter() - started) * 1e6
        step_us = (clock.step_s - step_s) * 1e6
        forward_us = (clock.forward_s - forward_s) * 1e6
        steps.append(Step(step_us - forward_us, forward_us, whole_us - step_us))
    return steps
