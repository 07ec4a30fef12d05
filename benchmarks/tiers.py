"""How soon an answer begins when a conversation comes back: from pool, memory, disk, or computed.

No server: an engine, its pool and its tiers. Says from which length on loading beats computing, and
whether the engine knows.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run

if TYPE_CHECKING:
    from benchmarks.lab.returning import Loaded, Return

ABOUT = About(
    name="tiers",
    measures=(
        "Two conversations of random tokens take turns in a pool that has room for one, so that "
        "each return finds its blocks where the other has pushed them: in the pool (which has room "
        "for both), in host memory, on disk with the operating system's page cache warm, on disk "
        "with its pages dropped, or nowhere, and then its prompt is computed. A return brings 24 "
        "new tokens; measured is the time to its first token, in an engine without a server, with "
        "pocket and with a Llama of 78 million random weights made on the spot, in fp32 on one "
        "thread. "
        "Cases take turns within a round; `ttft_ms` and `cpu_ms` are medians. What is compared is "
        "the best time of each case, because other work on the cores adds tens of milliseconds: "
        "`share_of_computed`, `crossover_tokens` (the length from which on a tier beats computing; "
        "the shortest one measured where it always does), and `regret`: what the case `decided`, "
        "in which the engine itself chooses between disk and computing, takes over the better one."
    ),
    goals=(
        Goal(
            "host_share_512",
            0.35,
            "at most",
            "from host memory a return of 512 tokens takes at most 0.35 of computing (78 M)",
        ),
        Goal(
            "disk_share_512",
            0.5,
            "at most",
            "from disk, pages in memory, at most 0.5 of computing (78 M)",
        ),
        Goal(
            "regret",
            1.3,
            "at most",
            "the engine's choice takes at most 1.3 x the better one (median over lengths, 78 M)",
        ),
    ),
)

_SEED = 0
_SHORT_TOKENS = 128
_THREADS = 1  # two would have to find both cores free at once, on a machine that others use
_POCKET = Path(__file__).parent.parent / "pocket" / "target"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How often, and at which lengths."""

    rounds: int
    turns: int  # of both conversations, in each round; more of short ones
    pocket_tokens: tuple[int, ...]
    llama_tokens: tuple[int, ...]


_FULL = Sizes(
    rounds=2, turns=2, pocket_tokens=(16, 32, 128, 512, 1536), llama_tokens=(16, 32, 128, 512)
)
_QUICK = Sizes(rounds=1, turns=1, pocket_tokens=(32, 64), llama_tokens=(32, 512))


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    """Pocket, then the larger model; each in all cases at all lengths."""
    from benchmarks.lab import returning

    sizes = _QUICK if settings.quick else _FULL
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headgate-tiers-") as scratch:
        folder = Path(scratch)
        llama = returning.make_model(folder / "llama-78m", _POCKET, seed=_SEED)
        models = {
            "pocket": (_POCKET, sizes.pocket_tokens),
            "llama-78m": (llama, sizes.llama_tokens),
        }
        for name, (source, lengths) in models.items():
            loaded = returning.load(source, max(lengths), _THREADS)
            settings.progress(f"{name} is loaded")
            returns = _returns(loaded, lengths, sizes, folder, settings)
            results[name] = _tell(loaded, returns, lengths)
    told = results["llama-78m"]
    values = {
        "host_share_512": told["share_of_computed"]["host"]["512"],
        "disk_share_512": told["share_of_computed"]["disk"]["512"],
        "regret": median(told["regret"].values()),
    }
    return Measured(_rounded(results), values, {"threads": _THREADS, "device": "cpu"})


Returns = dict[tuple[str, int], list["Return"]]


def _returns(
    loaded: Loaded, lengths: tuple[int, ...], sizes: Sizes, folder: Path, settings: Settings
) -> Returns:
    """Every case at every length, in rounds."""
    from benchmarks.lab.returning import CASES, visits

    rng = random.Random(_SEED)
    returns: Returns = {}
    for number in range(sizes.rounds):
        for tokens in lengths:
            for case in CASES:
                with visits(loaded, case, tokens, folder, rng) as guests:
                    turns = sizes.turns * (2 if tokens <= _SHORT_TOKENS else 1)
                    seen = [one for _ in range(turns) for one in guests.come_back()]
                _check(case, tokens, seen)
                returns.setdefault((case, tokens), []).extend(seen)
        settings.progress(f"round {number + 1} of {sizes.rounds} is measured")
    return returns


def _check(case: str, tokens: int, seen: list[Return]) -> None:
    """A case that does not do what its name says is not measured."""
    found = {one.found_tokens for one in seen}
    expected = {"computed": {0}, "decided": found}.get(case, {tokens})
    if found != expected:
        raise MeasurementFailed(
            f"{case} at {tokens} tokens: {sorted(found)} tokens were found, expected {expected}"
        )


def _tell(loaded: Loaded, returns: Returns, lengths: tuple[int, ...]) -> dict[str, Any]:
    from benchmarks.lab.returning import CASES

    ttft_s = {
        case: {size: [one.ttft_s for one in returns[case, size]] for size in lengths}
        for case in CASES
    }
    cpu_s = {
        case: {size: [one.cpu_s for one in returns[case, size]] for size in lengths}
        for case in CASES
    }
    best = {case: {size: min(ttft_s[case][size]) for size in lengths} for case in CASES}
    computed = best["computed"]
    tiers = [case for case in CASES if case not in ("computed", "decided")]
    return {
        "block_bytes": loaded.model.block_bytes,
        "ttft_ms": {case: _ms(ttft_s[case]) for case in CASES},
        "best_ttft_ms": {case: {str(n): 1000 * best[case][n] for n in lengths} for case in CASES},
        "cpu_ms": {case: _ms(cpu_s[case]) for case in CASES},
        "share_of_computed": {
            case: {str(size): best[case][size] / computed[size] for size in lengths}
            for case in tiers
        },
        "crossover_tokens": {case: _crossover(best[case], computed) for case in tiers},
        "loaded_share": {
            str(size): sum(one.found_tokens > 0 for one in seen) / len(seen)
            for size in lengths
            for seen in [returns["decided", size]]
        },
        "regret": {
            str(size): best["decided"][size] / min(best["disk"][size], computed[size])
            for size in lengths
        },
    }


def _ms(by_length: dict[int, list[float]]) -> dict[str, float]:
    return {str(size): 1000 * median(seconds) for size, seconds in by_length.items()}


def _crossover(tier: dict[int, float], computed: dict[int, float]) -> float | None:
    """The length from which on `tier` is faster, linear between lengths; None when it never is."""
    gains = [(size, computed[size] - tier[size]) for size in sorted(tier)]
    if gains[-1][1] <= 0:
        return None
    for (low, lost), (high, won) in reversed(list(pairwise(gains))):
        if lost <= 0 < won:
            return low + (high - low) * -lost / (won - lost)
    return float(gains[0][0])


def _rounded(value: Any) -> Any:
    """Four significant digits: what lies behind them is noise."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
