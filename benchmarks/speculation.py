"""Speculative decoding: every way of guessing against none, on the same requests, in turns.

The engine alone, without a server, one thread. `lab.speculating` has the engines and the clock.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from benchmarks.lab import models
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.models import LLAMA_252M, QWEN_05B
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run
from benchmarks.lab.samples import four_digits

if TYPE_CHECKING:
    from benchmarks.lab.open_loop import Arrival
    from benchmarks.lab.speculating import Bench, Way
    from cache.tokens import Tokenizer
    from runtime.engine import Engine

PARTS = ("pocket", "pocket-compiled", "synthetic", "spec-bench", "replay", "transformers", "peers")
_SHARED = ROOT.parent / "shared" / "data"
_TOGETHER = (1, 4, 16, 32)
_ROWS = 4  # of each task
_ALONE = ("self",), ("tree",)  # ways that lose with one answer are not tried with more
_ROUNDS = 3
_RATES = (0.6, 0.7, 0.8, 0.9)
_GUESSES = (1, 3, 5)
_CATEGORY_PROMPTS = 4
_PEERS_ROWS, _PEERS_ROUNDS = 2, 5
_REPLAYED = 60
_REPLAY_PROMPT, _REPLAY_NEW = 1000, 48
# What is told of a way over none, in the same round.
_RATIOS = {"speedup": "tok_s", "decode_speedup": "decode_tok_s", "tpot_p99_ratio": "tpot_p99_ms"}
_LOADS = (0.5, 1.0, 2.0)  # of what the machine can serve

ABOUT = About(
    name="speculation",
    measures=(
        "Held-out rows of pocket's tasks, greedy, 1 to 32 at once, by every way of guessing in "
        "turns: none, look-up and draft model with a fixed number of guesses, half of the model's "
        "own layers, and `auto` with and without the draft, with torch alone and compiled; random "
        "models of 252 M parameters and of Qwen2.5-0.5B's geometry with synthetic acceptance; "
        "Spec-Bench's prompts by category; recorded traffic at half, all and twice of what the "
        "machine can serve; transformers' assisted generation with the same pair; and peers that "
        "guess, each in an environment of its own, on the same pair and rows. Decoding speed "
        "counts tokens behind each answer's first. Time is the CPU time of the computing thread."
    ),
    goals=(
        Goal("pocket_decode_speedup", 1.8, "at least", "pocket, one at a time: best way over none"),
        Goal(
            "auto_over_best",
            0.97,
            "at least",
            "auto over the better of none and the best fixed way, at every number of requests",
        ),
        Goal("draft_acceptance", 0.75, "at least", "guesses of pocket's draft that are right"),
        Goal("theory_error", 0.02, "at most", "tokens a step against (1 - a^(k+1)) / (1 - a)"),
        Goal("cost_error", 0.1, "at most", "time of a step against the engine's own table"),
        Goal("replay_throughput", 0.99, "at least", "recorded traffic: auto over none, worst load"),
        Goal("replay_tpot_p99", 1.02, "at most", "recorded traffic: p99 TPOT, auto over none"),
        Goal("over_transformers", 1.0, "at least", "our speed-up over assisted generation's"),
        Goal("over_peers", 1.0, "at least", "our speed-up with the draft over every peer's"),
        Goal("tokens_over_peers", 1.0, "at least", "our tokens a CPU-second over the best peer's"),
    ),
    parts=PARTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    """One part after another; a goal whose part did not run says so."""
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for part in settings.parts or PARTS:
        try:
            results[part] = _PARTS[part](settings, values)
        except MeasurementFailed as error:
            missing[part] = str(error)
    if not results:
        raise MeasurementFailed("; ".join(missing.values()))
    reasons = "; ".join(missing.values()) or "its part was not chosen"
    not_measured = {goal.name: reasons for goal in ABOUT.goals if goal.name not in values}
    return Measured(four_digits(results), four_digits(values), not_measured=not_measured)


def _pocket(*, compiles: bool) -> Bench:
    from benchmarks.lab.speculating import Bench

    return Bench(ROOT / "pocket" / "target", ROOT / "pocket" / "draft", compiles=compiles)


def _task_prompts(tokenizer: Tokenizer, first: int, count: int) -> list[list[int]]:
    """Rows `first` to `first + count` of every task."""
    from pocket.tasks import TASKS, row

    rows = [row(task, "test", 0, at) for at in range(first, first + count) for task in TASKS]
    return [tokenizer.encode_chat(one.messages, tools=one.tools) for one in rows]


# ---- pocket --------------------------------------------------------------------------------------


def _tasks(settings: Settings, values: dict[str, float], *, compiles: bool) -> dict[str, Any]:
    from benchmarks.lab.speculating import OFF, WAYS, acceptance, serve_closed
    from runtime.sequence import Sampling

    bench = _pocket(compiles=compiles)
    count, first = (1 if settings.quick else _ROWS), 0
    sampling = Sampling(temperature=0.0, max_tokens=100)
    engines = {way: bench.engine(way) for way in WAYS}
    told: dict[str, Any] = {}
    for together in (1, 4) if settings.quick else _TOGETHER:
        rounds: dict[Way, list[dict[str, float]]] = {}
        for turn in range(1 if settings.quick else _ROUNDS):
            # Rows of their own each time: no look-up may find an answer that was given before.
            prompts = _task_prompts(bench.tokenizer, first, count)
            first += count
            ways = [way for way in WAYS if together == 1 or way.made_of[:1] not in _ALONE]
            for way in islice(cycle(ways), turn, turn + len(ways)):
                figures = serve_closed(engines[way], prompts, sampling, together).figures()
                rounds.setdefault(way, []).append(figures)
        told[str(together)] = _beside(rounds, OFF)
        settings.progress(f"{'compiled' if compiles else 'torch'}, {together} at once")
    for way, engine in engines.items():
        if way is not OFF:
            told.setdefault("acceptance", {})[way.name] = acceptance(engine)
    if not compiles:
        values["pocket_decode_speedup"] = max(
            one["decode_speedup"] for one in told["1"].values() if "decode_speedup" in one
        )
        values["draft_acceptance"] = told["acceptance"]["draft 3"]["acceptance"]
        values["auto_over_best"] = min(
            _auto_over_best(one) for one in told.values() if "off" in one
        )
    return told


def _beside(rounds: dict[Way, list[dict[str, float]]], off: Way) -> dict[str, dict[str, float]]:
    """Medians of each way, and its speed over none within each round."""
    told = {}
    for way, mine in rounds.items():
        names = dict.fromkeys(name for one in mine for name in one)
        figures = {name: median([one[name] for one in mine if name in one]) for name in names}
        for name, figure in _RATIOS.items():
            pairs = zip(mine, rounds[off], strict=True)
            figures[name] = median([one[figure] / plain[figure] for one, plain in pairs])
        told[way.name] = figures
    return told


def _auto_over_best(told: dict[str, dict[str, float]]) -> float:
    """Of automatic ways the one with everything, over the best that is fixed."""
    fixed = max(one["speedup"] for name, one in told.items() if not name.startswith("auto"))
    return told["auto with draft"]["speedup"] / fixed


# ---- synthetic -----------------------------------------------------------------------------------


def _synthetic(settings: Settings, values: dict[str, float]) -> dict[str, Any]:
    from benchmarks.lab.speculating import Bench

    told: dict[str, Any] = {}
    errors: list[float] = []
    cost_errors: list[float] = []
    for geometry in (LLAMA_252M,) if settings.quick else (LLAMA_252M, QWEN_05B):
        bench = Bench(models.make(geometry), None, compiles=True)
        told[geometry.name] = _rates(bench, settings, errors, cost_errors)
        settings.progress(f"synthetic, {geometry.name}")
    values["theory_error"] = max(errors)
    values["cost_error"] = median(cost_errors)
    return told


def _rates(
    bench: Bench, settings: Settings, errors: list[float], cost_errors: list[float]
) -> dict[str, Any]:
    """Each rate and number of guesses, one answer at a time."""
    from benchmarks.lab.speculating import OFF, serve_closed
    from runtime.costs import StepSize
    from runtime.sequence import Sampling
    from runtime.speculation import Mode, Modes, Speculation
    from spec_decode.synthetic import Synthetic

    engine = bench.engine(OFF, max_sequences=8)
    prompts = [list(range(100, 132))]
    sampling = Sampling(temperature=0.0, max_tokens=24 if settings.quick else 96, ignore_eos=True)
    plain = serve_closed(engine, prompts, sampling, 1).figures()
    told: dict[str, Any] = {"off": plain}
    costs = engine._scheduler.costs
    assert costs is not None
    for rate in _RATES[::3] if settings.quick else _RATES:
        for count in _GUESSES[1:2] if settings.quick else _GUESSES:
            proposer = Synthetic(rate, random.Random(0), token=7)
            engine.speculation = Speculation([proposer], Modes(Mode("synthetic", count)))
            figures = serve_closed(engine, prompts, sampling, 1).figures()
            counts = engine.speculation.counts
            theory = (1 - rate ** (count + 1)) / (1 - rate)
            whole = [1 + counts.accepted / counts.drafts]
            expected_s = costs.estimate(StepSize(1 + count, 80, 0, 1, count * 80))
            step_s = figures["tokens_a_step"] / figures["decode_tok_s"]
            cost_errors.append(abs(step_s / expected_s - 1))
            told[f"rate {rate}, {count} guesses"] = {
                "tokens_a_step": whole[0],
                "theory": theory,
                "decode_speedup": figures["decode_tok_s"] / plain["decode_tok_s"],
                "formula_speedup": theory * costs.estimate(StepSize(1, 80)) / expected_s,
            }
    engine.speculation = None
    errors += _theory_errors()
    return told


def _theory_errors() -> list[float]:
    """The rule alone, over enough drafts to tell two per cent."""
    from spec_decode.synthetic import Synthetic

    errors = []
    for rate in _RATES:
        for count in _GUESSES:
            synthetic = Synthetic(rate, random.Random(1))
            drafts = [synthetic._propose(count) for _ in range(40_000)]
            said = fmean(1 + (draft.forced or 0) for draft in drafts)
            errors.append(abs(said * (1 - rate) / (1 - rate ** (count + 1)) - 1))
    return errors


# ---- prompts of others ---------------------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MeasurementFailed(f"{path.name} is not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _spec_bench(settings: Settings, values: dict[str, float]) -> dict[str, Any]:
    from benchmarks.lab.speculating import OFF, WAYS, serve_closed
    from runtime.sequence import Sampling

    del values
    questions = _lines(_SHARED / "prompts" / "spec_bench.jsonl.gz")
    bench = _pocket(compiles=False)
    by_category: dict[str, list[list[int]]] = {}
    for one in questions:
        turn = [{"role": "user", "content": one["turns"][0]}]
        prompt = bench.tokenizer.encode_chat(turn)[-1500:]
        mine = by_category.setdefault(one["category"], [])
        if len(mine) < (1 if settings.quick else _CATEGORY_PROMPTS):
            mine.append(prompt)
    ways = [way for way in WAYS if way is OFF or way.name in ("ngram 3", "auto with draft")]
    engines = {way: bench.engine(way) for way in ways}
    sampling = Sampling(temperature=0.0, max_tokens=64, ignore_eos=True)
    told = {}
    for category, prompts in by_category.items():
        figures = {
            way: serve_closed(engine, prompts, sampling, 1).figures()
            for way, engine in engines.items()
        }
        told[category] = {
            way.name: one | {"decode_speedup": one["decode_tok_s"] / figures[OFF]["decode_tok_s"]}
            for way, one in figures.items()
        }
        settings.progress(f"spec bench, {category}")
    return told


def _replay(settings: Settings, values: dict[str, float]) -> dict[str, Any]:
    from benchmarks.lab.open_loop import ComputeClock, serve_arrivals
    from benchmarks.lab.speculating import OFF, WAYS, Told

    requests = _lines(_SHARED / "replay" / "requests.jsonl.gz")
    bench = _pocket(compiles=True)
    count, first = (12 if settings.quick else _REPLAYED), 0
    ways = [way for way in WAYS if way is OFF or way.name == "auto with draft"]
    engines = {way: bench.engine(way) for way in ways}
    capacity_s = _capacity_s(bench, engines[OFF], requests[-count:])
    told: dict[str, Any] = {}
    for load in _LOADS[1:2] if settings.quick else _LOADS:
        rounds: dict[Way, list[dict[str, float]]] = {}
        for _ in range(1 if settings.quick else _ROUNDS):
            chosen = requests[first : first + count]  # others each time, as above
            first += count
            for way, engine in engines.items():
                clock = engine.now
                assert isinstance(clock, ComputeClock)
                arrivals = _arrivals(bench, chosen, clock(), capacity_s / load)
                engine.forget_cached()
                began, steps = clock(), engine.clock.steps
                served = serve_arrivals(engine, clock, arrivals)
                rounds.setdefault(way, []).append(
                    Told(
                        [one.token_s for one in served],
                        [one.arrival.at_s for one in served],
                        clock() - began,
                        engine.clock.steps - steps,
                    ).figures()
                )
        told[f"load {load}"] = _beside(rounds, OFF)
        settings.progress(f"replay, load {load}")
    values["replay_throughput"] = min(one["auto with draft"]["speedup"] for one in told.values())
    values["replay_tpot_p99"] = max(
        one["auto with draft"]["tpot_p99_ratio"] for one in told.values()
    )
    return told


def _capacity_s(bench: Bench, engine: Engine, requests: Iterable[dict[str, Any]]) -> float:
    """How long the machine takes for them when it never waits."""
    from benchmarks.lab.open_loop import ComputeClock, serve_arrivals

    clock = engine.now
    assert isinstance(clock, ComputeClock)
    began = clock()
    serve_arrivals(engine, clock, _arrivals(bench, list(requests), began, 0.0))
    return clock() - began


def _arrivals(
    bench: Bench, requests: list[dict[str, Any]], now: float, span_s: float
) -> list[Arrival]:
    """In the rhythm of the recording, brought to `span_s` seconds."""
    from benchmarks.lab.open_loop import Arrival
    from runtime.sequence import Service

    began_ms = requests[0]["t_ms"]
    recorded_ms = requests[-1]["t_ms"] - began_ms
    return [
        Arrival(
            now + span_s * (one["t_ms"] - began_ms) / recorded_ms,
            one["kind"],
            bench.tokenizer.encode_chat(one["body"]["messages"])[-_REPLAY_PROMPT:],
            _REPLAY_NEW,
            Service(tier=one["tier"], route=one["kind"]),
        )
        for one in requests
    ]


# ---- a peer --------------------------------------------------------------------------------------


def _transformers(settings: Settings, values: dict[str, float]) -> dict[str, Any]:
    """`generate` with the same draft as assistant, on the same prompts, against itself without."""
    from time import thread_time

    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.lab.speculating import OFF, WAYS, serve_closed
    from runtime.sequence import Sampling

    bench = _pocket(compiles=False)
    prompts = _task_prompts(bench.tokenizer, 0, 1)
    target: Any
    target, draft = (
        AutoModelForCausalLM.from_pretrained(ROOT / "pocket" / part, dtype=torch.float32)
        for part in ("target", "draft")
    )
    told: dict[str, Any] = {}
    for name, more in (
        ("generate", {}),
        ("assisted", {"assistant_model": draft}),
        ("prompt lookup", {"prompt_lookup_num_tokens": 3}),
    ):
        tokens, took_s = 0, 0.0
        for prompt in prompts:
            began = thread_time()
            ids = torch.tensor([prompt])
            whole = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=100,
                do_sample=False,
                **more,
            )
            took_s += thread_time() - began
            tokens += whole.shape[1] - len(prompt)
        told[name] = {"tok_s": tokens / took_s}
        settings.progress(f"transformers, {name}")
    sampling = Sampling(temperature=0.0, max_tokens=100)
    for way in WAYS:
        if way is OFF or way.name in ("ngram 3", "draft 5", "auto with draft"):
            engine = bench.engine(way)
            told[f"headgate {way.name}"] = serve_closed(engine, prompts, sampling, 1).figures()
    theirs = told["assisted"]["tok_s"] / told["generate"]["tok_s"]
    ours = told["headgate draft 5"]["tok_s"] / told["headgate off"]["tok_s"]
    told["speedups"] = {"assisted": theirs, "headgate draft 5": ours}
    values["over_transformers"] = ours / theirs
    return told


def _peers(settings: Settings, values: dict[str, float]) -> dict[str, Any]:
    """Rows that are new each round, as above; the first round warms up."""
    from benchmarks.lab.guessing_peers import measure_pair, over_peers, tokens_over_peers
    from cache.tokens import Tokenizer

    tokenizer = Tokenizer.load(ROOT / "pocket" / "target")
    count = 1 if settings.quick else _PEERS_ROWS
    rounds = [
        _task_prompts(tokenizer, turn * count, count)
        for turn in range(1 + (1 if settings.quick else _PEERS_ROUNDS))
    ]
    (end,) = tokenizer.eos_ids
    told = measure_pair(rounds, end, settings.progress)
    over = dict(over_peers(told))
    if not over:
        raise MeasurementFailed(f"no peer ran: {told['failed']}")
    values["over_peers"] = min(over.values())
    values["tokens_over_peers"] = tokens_over_peers(told)
    return told | {"ours over theirs": over}


_PARTS = {
    "pocket": lambda settings, values: _tasks(settings, values, compiles=False),
    "pocket-compiled": lambda settings, values: _tasks(settings, values, compiles=True),
    "synthetic": _synthetic,
    "spec-bench": _spec_bench,
    "replay": _replay,
    "transformers": _transformers,
    "peers": _peers,
}

if __name__ == "__main__":
    sys.exit(main())
