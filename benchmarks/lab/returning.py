"""Conversations that come back to an engine after its pool has given their blocks up.

Imports torch, so that only those who measure the engine import this module, and late. Two
conversations of one length take turns in a pool that has room for one of them: each return finds
its blocks where the other one has pushed them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.lab.report import MeasurementFailed
from cache.disk import DiskTier
from cache.tiers import MemoryTier, Tiers
from cache.tokens import Tokenizer
from runtime.costs import StepCosts
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.loading import load_model
from runtime.model import Model
from runtime.sequence import Sampling
from runtime.swap import Swap

# Where a return finds its blocks. `decided` is `disk` with the engine's own choice between loading
# and computing; in the others whatever is found is loaded.
CASES = ("computed", "pool", "host", "disk", "disk_cold", "decided")
_ON_DISK = ("disk", "disk_cold", "decided")
NEW_TOKENS = 24  # of each turn: not whole blocks, so that the first answer token needs none
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer, and what its steps cost here."""

    model: Model
    tokenizer: Tokenizer
    costs: StepCosts


@dataclass(frozen=True, slots=True)
class Return:
    """One turn of a conversation that was there before."""

    ttft_s: float
    cpu_s: float
    found_tokens: int


def load(folder: Path, tokens: int, threads: int) -> Loaded:
    """On the CPU, with a pool for two conversations of `tokens`, measured as a worker does it."""
    torch.set_num_threads(threads)
    model, folder = load_model(folder, kv_tokens=2 * (tokens + 4 * BLOCK_TOKENS), device="cpu")
    tokenizer = Tokenizer.load(folder)
    engine = Engine(model, tokenizer, emit=lambda _: None, step_tokens=2048)
    return Loaded(model, tokenizer, engine.calibrate())


def make_model(folder: Path, tokenizer: Path, *, seed: int) -> Path:
    """A Llama of 78 million random weights with another model's tokenizer; returns the folder."""
    import transformers

    config: Any = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


class Visits:
    """One engine over one kind of tiers, and two conversations of `tokens` that take turns."""

    def __init__(
        self, loaded: Loaded, case: str, tokens: int, folder: Path, rng: random.Random
    ) -> None:
        self._case, self._rng = case, rng
        model = loaded.model
        self._vocabulary = min(loaded.tokenizer.vocab_size, model.vocab_size)
        needed = blocks_for(tokens + NEW_TOKENS)
        model.blocks = 2 * needed + 2 if case == "pool" else needed  # the tensors hold more
        self.swap = None if case in ("computed", "pool") else self._swap(loaded, folder)
        self._folder = folder
        self._engine = Engine(
            model, loaded.tokenizer, emit=lambda _: None, step_tokens=2048, swap=self.swap
        )
        self._pasts = [self._some(tokens) for _ in range(2)]
        for past in self._pasts:
            self._ask(past + self._some(NEW_TOKENS))

    def _swap(self, loaded: Loaded, folder: Path) -> Swap:
        model, disk = loaded.model, None
        if self._case in _ON_DISK:
            disk = DiskTier(
                folder, limit_bytes=_GIB, block_bytes=model.block_bytes, identity={"bench": 1}
            )
        memory = MemoryTier(0 if disk else _GIB)
        costs = loaded.costs if self._case == "decided" else None
        swap = Swap(model, Tiers(memory, disk), costs=costs)
        swap.measure()
        return swap

    def come_back(self) -> Iterator[Return]:
        """One turn of each conversation."""
        for past in self._pasts:
            if self.swap is not None and (disk := self.swap.tiers.lower) is not None:
                if not disk.drain(60):
                    raise MeasurementFailed("the disk did not take its blocks within a minute")
                if self._case == "disk_cold":
                    forget_pages(self._folder)
            yield self._ask(past + self._some(NEW_TOKENS))

    def close(self) -> None:
        if self.swap is not None:
            self.swap.tiers.close()

    def _some(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocabulary) for _ in range(count)]

    def _ask(self, prompt: list[int]) -> Return:
        greedy = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
        cpu, began = process_time(), perf_counter()
        self._engine.submit([Order(prompt, greedy)])
        self._engine.take_orders(wait=False)
        while not (outputs := self._engine.step()):
            pass
        seconds, cpu_s = perf_counter() - began, process_time() - cpu
        if outputs[0].error is not None:
            raise MeasurementFailed(f"a return of {len(prompt)} tokens failed: {outputs[0].error}")
        return Return(seconds, cpu_s, outputs[0].cached_tokens)


@contextmanager
def visits(
    loaded: Loaded, case: str, tokens: int, folder: Path, rng: random.Random
) -> Iterator[Visits]:
    one = Visits(loaded, case, tokens, folder / f"{case}-{tokens}", rng)
    try:
        yield one
    finally:
        one.close()
        shutil.rmtree(folder / f"{case}-{tokens}", ignore_errors=True)


def forget_pages(folder: Path) -> None:
    """Makes the operating system read the blocks from the device; where it can be asked to."""
    for file in folder.glob("*/*/blocks"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
