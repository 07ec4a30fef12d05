"""How soon the stack is ready, how fast an answer begins and flows, and what we ourselves add.

The stack is the policy that ships, started as a user starts it; the client is one process with one
event loop on the same machine, so that it takes its share of the cores.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import uvloop

from benchmarks.lab import stack as stacks
from benchmarks.lab.client import open_session
from benchmarks.lab.load import Load, held_out_rows
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import four_digits, spread
from benchmarks.lab.stack import Stack

ABOUT = About(
    name="first_stream",
    measures=(
        "Starts `headgate serve` with the policy that ships and the pocket model, several times. "
        "Through the gateway it measures the time to the first token of held-out rows of all "
        "tasks one after another (greedy, natural end), and tokens a second at 1 and at 8 streams "
        "of 64 tokens each (temperature 2, so that nearly every token is text and a chunk of its "
        "own). One short question goes straight to the worker and through the gateway in turns, "
        "which gives what the gateway adds; clients leave in mid-answer, which gives how soon the "
        "worker has dropped their requests; CPU time and resident memory are read from the "
        "operating system. Without a server, an engine decodes 16 sequences: what a step costs "
        "beyond the model's forward."
    ),
    goals=(
        Goal("ready_s", 15.0, "at most", "ready in 15 s"),
        Goal(
            "step_overhead_us",
            500.0,
            "at most",
            "engine overhead of at most 500 us a step at 16 sequences",
        ),
        Goal(
            "cancel_ms", 50.0, "at most", "a request cancelled within 50 ms of a disconnect (p95)"
        ),
        Goal("gateway_rss_mb", 100.0, "at most", "gateway's resident memory of at most 100 MB"),
    ),
)

_SEQUENCES = 16
_SEED = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How often each measurement is made."""

    starts: int
    answers: int
    repeats: int  # of tokens a second, at each number of streams
    pairs: int
    cancels: int
    cost_rounds: int
    cost_requests: int  # a round, short ones and long ones each
    engine_runs: int
    engine_tokens: int  # of each sequence


_FULL = Sizes(
    starts=3,
    answers=120,
    repeats=7,
    pairs=300,
    cancels=40,
    cost_rounds=5,
    cost_requests=20,
    engine_runs=5,
    engine_tokens=128,
)
_QUICK = Sizes(
    starts=1,
    answers=4,
    repeats=1,
    pairs=6,
    cancels=4,
    cost_rounds=1,
    cost_requests=4,
    engine_runs=1,
    engine_tokens=24,
)


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    """The stack first, then the engine alone, never both at once."""
    sizes = _QUICK if settings.quick else _FULL
    ready_s = []
    for number in range(1, sizes.starts):
        with stacks.serve() as stack:
            ready_s.append(stack.ready_s)
        settings.progress(f"start {number} of {sizes.starts}: ready in {ready_s[-1]:.1f} s")
    with stacks.serve() as stack:
        ready_s.append(stack.ready_s)
        settings.progress(f"start {sizes.starts} of {sizes.starts}: {stack.ready_s:.1f} s")
        served = _on_loop(_measure_served(stack, sizes, settings.progress))
        facts = stack.worker_facts
    steps = measure_steps(sizes, settings.progress)
    ready = {"ready_s": median(ready_s), "ready_runs_s": ready_s}
    results = four_digits({**ready, **served, **steps})
    values = {goal.name: results[goal.name] for goal in ABOUT.goals}
    told = {name: facts.get(name) for name in ("model", "device", "dtype", "threads", "parameters")}
    return Measured(results, values, told)


def _on_loop(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


# ---- through the gateway -------------------------------------------------------------------------


async def _measure_served(
    stack: Stack, sizes: Sizes, progress: Callable[[str], None]
) -> dict[str, Any]:
    async with open_session() as session:
        load = Load(session, stack, held_out_rows())
        await load.warm_up()
        first = await load.first_tokens(sizes.answers)
        progress("time to first token is measured")
        speed = await load.speeds(sizes.repeats)
        progress("tokens a second are measured")
        added = await load.added_by_gateway(sizes.pairs)
        progress("what the gateway adds is measured")
        cost = await load.cpu_costs(sizes.cost_rounds, sizes.cost_requests)
        progress("CPU time is measured")
        gone = await load.cancellations(sizes.cancels)
        progress("cancellation is measured")
    memory = {
        "gateway_rss_mb": stacks.resident_mb(stack.gateway),
        "worker_rss_mb": stacks.resident_mb(stack.worker),
    }
    return {**first, **speed, **added, **cost, **gone, **memory}


# ---- the engine alone ----------------------------------------------------------------------------


def measure_steps(sizes: Sizes, progress: Callable[[str], None]) -> dict[str, Any]:
    """Microseconds a decode step beyond the forward; the median over runs of each run's mean."""
    from benchmarks.lab import engine_steps
    from runtime.sequence import Sampling

    loaded = engine_steps.load(Path(__file__).parent.parent / "pocket" / "target")
    rows = held_out_rows()
    prompts = [
        loaded.tokenizer.encode_chat(one.messages, tools=one.tools)
        for one, _ in zip(rows, range(_SEQUENCES), strict=False)
    ]
    greedy = Sampling(temperature=0.0, max_tokens=sizes.engine_tokens, ignore_eos=True)
    sampled = replace(greedy, temperature=0.8, top_p=0.9, seed=_SEED)
    kinds = {"greedy": greedy, "sampled": sampled}
    engine_steps.decode_steps(loaded, prompts, sampled)  # the first run pays for warm-up
    timed: dict[str, list[list[engine_steps.Step]]] = {kind: [] for kind in kinds}
    for _ in range(sizes.engine_runs):
        for kind, sampling in kinds.items():
            timed[kind].append(engine_steps.decode_steps(loaded, prompts, sampling))
    progress(f"engine steps with {_SEQUENCES} sequences are measured")
    told = {}
    for kind, taken in timed.items():
        steps = [step for one in taken for step in one]
        overhead_us = [step.overhead_us for step in steps]
        told[kind] = {
            "mean_us": median(mean(step.overhead_us for step in one) for one in taken),
            **{f"{name}_us": value for name, value in spread(overhead_us).items()},
            "forward_p50_us": median(step.forward_us for step in steps),
            "orders_p50_us": median(step.outside_us for step in steps),
        }
    return {"step_overhead_us": told["greedy"]["mean_us"], "step_overhead": told}


if __name__ == "__main__":
    sys.exit(main())
