"""Long prompts that arrive among running chats: prefill whole, in chunks of a fixed budget, and in
chunks that follow from the targets of the answers that run.

The engine alone, without a server; `lab.open_loop` has the arrivals and the clock.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.lab import models
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.models import LLAMA_22M
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import four_digits, percentile

if TYPE_CHECKING:
    from benchmarks.lab.open_loop import Arrival, Served
    from cache.tokens import Tokenizer
    from runtime.costs import StepCosts
    from runtime.model import Model
    from runtime.sequence import Service

_FIXED = (64, 128, 256, 512, 1024)
_OFF, _OURS = "off", "ours"
_WHOLE_STEP = 1 << 16  # a budget that no step reaches
_LOADS = (0.4, 0.8)  # of what the machine can compute
_SEED = 0
_ROUNDS = 3  # of all variants at one load, in turns: the median tells, and the largest of gaps
_GAP_TARGETS = 3.0
# A chat's target is this many times what a step of so many decodes costs on this machine.
_TARGET_STEPS, _TARGET_BATCH = 3.0, 8
_MAX_SEQUENCES = 32
_KV_TOKENS = 32768

ABOUT = About(
    name="chunked_prefill",
    measures=(
        "Chats arrive at random (short prompts, answers of 64 tokens), long prompts among them, "
        "at 40 and 80 % of what the machine can compute; on pocket and on a random model of "
        "22 M parameters, one thread. Every variant serves the same arrivals: chunking off, fixed "
        "budgets of tokens a step, and ours, which cuts chunks to the chats' target for the time "
        "of a token (three steps of eight decodes) by the engine's own table of step costs. Tells "
        "time to first token, time per token, the largest gap of any chat, and tokens a second: "
        "medians of three rounds in turns, and the largest gap of all three. "
        "Time is the CPU time of the computing thread; waiting for arrivals is skipped."
    ),
    goals=(
        Goal(
            "largest_gap_over_target",
            _GAP_TARGETS,
            "at most",
            "largest gap within 3 x the TPOT target, wherever a fixed budget holds that",
        ),
        Goal(
            "throughput_over_best_fixed",
            0.95,
            "at least",
            "throughput within 5 % of the best fixed budget at every load",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much arrives in one run; prompts and answers in tokens."""

    chats: int
    longs: int
    chat_prompt: tuple[int, int]
    chat_new: int
    long_prompt: tuple[int, int]
    long_new: int


_FULL = {
    "pocket": Sizes(24, 6, (32, 128), 64, (1200, 1900), 16),
    "llama-22m": Sizes(12, 3, (32, 128), 64, (1200, 1900), 16),
}
_QUICK = Sizes(4, 1, (32, 64), 16, (600, 600), 4)


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    """One model after another; within each, every load with all variants in turns."""
    import torch

    torch.set_num_threads(1)
    loads = _LOADS[1:2] if settings.quick else _LOADS
    results: dict[str, Any] = {}
    for name, folder in (("pocket", ROOT / "pocket" / "target"), ("llama-22m", None)):
        sizes = _QUICK if settings.quick else _FULL[name]
        bench = _Bench.load(folder or models.make(LLAMA_22M))
        told = {"tpot_target_ms": 1e3 * bench.target_s}
        results[name] = told | {
            f"load {load}": _measure_load(bench, sizes, load, settings.progress, name)
            for load in loads
        }
    values = _values(results)
    missing = {
        goal.name: "no fixed budget held the gap at any load"
        for goal in ABOUT.goals
        if goal.name not in values
    }
    return Measured(four_digits(results), four_digits(values), not_measured=missing)


@dataclass(frozen=True, slots=True)
class _Bench:
    """A loaded model, what its steps cost, and the target that follows."""

    model: Model
    tokenizer: Tokenizer
    costs: StepCosts
    target_s: float

    @classmethod
    def load(cls, folder: Path) -> _Bench:
        from benchmarks.lab.open_loop import ComputeClock
        from cache.tokens import Tokenizer
        from runtime.calibrate import measure_costs
        from runtime.costs import StepSize
        from runtime.loading import load_model

        model, where = load_model(
            folder, kv_tokens=_KV_TOKENS, device="cpu", dtype="fp32", compiles=True
        )
        costs = measure_costs(model, 512, _MAX_SEQUENCES, budget_s=5.0, timer=ComputeClock())
        target_s = _TARGET_STEPS * costs.estimate(StepSize(_TARGET_BATCH))
        return cls(model, Tokenizer.load(where), costs, target_s)

    def mean_cost_s(self, sizes: Sizes) -> float:
        """Seconds of computing that all arrivals of one run take, in the cheapest way."""
        from runtime.costs import StepSize

        answers = sizes.chats * sizes.chat_new + sizes.longs * sizes.long_new
        decode_s = self.costs.estimate(StepSize(_TARGET_BATCH)) / _TARGET_BATCH
        chat_s = self.costs.prefill_s(sum(sizes.chat_prompt) // 2)
        long_s = self.costs.prefill_s(sum(sizes.long_prompt) // 2)
        return sizes.chats * chat_s + sizes.longs * long_s + answers * decode_s


def _measure_load(
    bench: _Bench, sizes: Sizes, load: float, progress: Callable[[str], None], name: str
) -> dict[str, Any]:
    arrivals = _arrivals(bench, sizes, bench.mean_cost_s(sizes) / load)
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(1 if sizes is _QUICK else _ROUNDS):
        for variant in (_OFF, *map(str, _FIXED), _OURS):
            told = _tell(_serve(bench, variant, arrivals), bench.target_s)
            rounds.setdefault(variant, []).append(told)
            progress(f"{name}, load {load}, {variant}: {told['largest_gap_ms']:.0f} ms")
    return {variant: _of_rounds(told) for variant, told in rounds.items()}


def _of_rounds(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure; of largest gaps, the largest."""
    return {
        name: (max if name.startswith("largest_gap") else median)([one[name] for one in rounds])
        for name in rounds[0]
    }


def _arrivals(bench: _Bench, sizes: Sizes, span_s: float) -> list[Arrival]:
    """Both kinds come uniformly at random over the span: a Poisson process, given its counts."""
    from benchmarks.lab.open_loop import Arrival
    from runtime.sequence import Service

    rng = random.Random(_SEED)
    vocabulary = min(bench.model.vocab_size, bench.tokenizer.vocab_size)

    def arrive(kind: str, lengths: tuple[int, int], new: int, service: Service) -> Arrival:
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(*lengths))]
        return Arrival(rng.uniform(0, span_s), kind, prompt, new, service)

    target = Service(tpot_s=bench.target_s)
    return [
        *(arrive("chat", sizes.chat_prompt, sizes.chat_new, target) for _ in range(sizes.chats)),
        *(arrive("long", sizes.long_prompt, sizes.long_new, target) for _ in range(sizes.longs)),
    ]


def _serve(bench: _Bench, variant: str, arrivals: list[Arrival]) -> list[Served]:
    """Ours is the engine as a worker has it; the others have a budget and no table of costs."""
    from benchmarks.lab.open_loop import ComputeClock, serve_arrivals
    from runtime.engine import Engine

    clock = ComputeClock()
    budget = {_OFF: _WHOLE_STEP, _OURS: 512}.get(variant) or int(variant)
    engine = Engine(
        bench.model,
        bench.tokenizer,
        emit=lambda _: None,
        step_tokens=budget,
        max_sequences=_MAX_SEQUENCES,
        now=clock,
        timer=clock,
    )
    if variant == _OURS:
        engine.calibrate()
    start = clock()
    moved = [_later(one, start) for one in arrivals]
    served = serve_arrivals(engine, clock, moved)
    engine.check()
    return served


def _later(arrival: Arrival, seconds: float) -> Arrival:
    from dataclasses import replace

    return replace(arrival, at_s=arrival.at_s + seconds)


# ---- telling -------------------------------------------------------------------------------------


def _tell(served: list[Served], target_s: float) -> dict[str, float]:
    chats = [one for one in served if one.arrival.kind == "chat"]
    longs = [one for one in served if one.arrival.kind == "long"]
    gaps = [max(one.gaps_s) for one in served if one.gaps_s]
    begin = min(one.arrival.at_s for one in served)
    span_s = max(one.token_s[-1] for one in served) - begin
    told = {"largest_gap_ms": 1e3 * max(gaps), "largest_gap_over_target": max(gaps) / target_s}
    told["median_largest_gap_ms"] = 1e3 * percentile(gaps, 50)
    for name, values in (
        ("chat_ttft", [one.ttft_s for one in chats]),
        ("long_ttft", [one.ttft_s for one in longs]),
        ("chat_tpot", [one.tpot_s for one in chats]),
    ):
        told[f"{name}_p50_ms"] = 1e3 * percentile(values, 50)
        told[f"{name}_p99_ms"] = 1e3 * percentile(values, 99)
    tokens = sum(len(one.arrival.prompt) + len(one.token_s) for one in served)
    told["tok_s"] = tokens / span_s
    return told


def _values(results: dict[str, Any]) -> dict[str, float]:
    """The worst over models and loads."""
    gaps, throughputs = [], []
    for model in results.values():
        for name, told in model.items():
            if not name.startswith("load"):
                continue
            fixed = [told[str(budget)] for budget in _FIXED]
            best = max(one["tok_s"] for one in fixed)
            throughputs.append(told[_OURS]["tok_s"] / best)
            if min(one["largest_gap_over_target"] for one in fixed) <= _GAP_TARGETS:
                gaps.append(told[_OURS]["largest_gap_over_target"])
    values = {"throughput_over_best_fixed": min(throughputs)}
    return values | ({"largest_gap_over_target": max(gaps)} if gaps else {})


if __name__ == "__main__":
    sys.exit(main())
