"""What each format of weights and of the KV cache costs in answers, and what it gives in speed.

The model is pocket. Every format answers the same held-out rows; fp32 is what they are compared
with.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.lab.report import About, Measured, Settings, run
from benchmarks.lab.samples import (
    four_digits,
    mean_interval,
    percentile,
    share_interval,
    sign_test,
)
from pocket.tasks import TASKS, Row, row
from policies.schema import Weights

if TYPE_CHECKING:
    from benchmarks.lab.formats import Loaded, Speed, Variant

ABOUT = About(
    name="quality",
    measures=(
        "Loads pocket in each format of weights (all parts alike, and eight bits with the output "
        "layer left alone), with activations in bf16, with the KV cache in eight bits, and "
        "compiled. Every variant answers the same held-out rows of all tasks, greedy: the share "
        "of exact matches, the share of answers that are another text than in fp32 (`flips`, with"
        " its 95 % interval), how many became right or wrong (`gained`, `lost`), and how likely "
        "so lopsided a split is by chance (`p`, exact sign test). Over the right answers, given "
        "token by token, it measures the Kullback-Leibler divergence from fp32's distribution (in"
        " thousandths of a nat a token; the interval of its mean is a bootstrap over rows) and "
        "perplexity. Speed is measured beside, the variants in turns: decoding 1 and 8 sequences,"
        " and a prompt of 512 tokens, as tokens a second, CPU milliseconds a token, and the ratio"
        " to fp32's tokens a second in the same round (median, and the rounds' smallest and "
        "largest)."
    ),
)

_BASE = "fp32"
_TARGET = Path(__file__).parent.parent / "pocket" / "target"
_SEED = 3
_PROMPT_TOKENS = 512
_BATCHES = (1, 8)
_PACKED_ROWS = 10  # whose distributions are computed in one step


@dataclass(frozen=True, slots=True)
class Sizes:
    rows: int  # a task, to be answered
    thought: int  # of them, a task, over which distributions are compared
    rounds: int  # of speed
    tokens: int  # of each decoded sequence


_FULL = Sizes(rows=60, thought=30, rounds=7, tokens=48)
_QUICK = Sizes(rows=2, thought=1, rounds=1, tokens=8)


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def variants() -> dict[str, Variant]:
    from benchmarks.lab.formats import Variant

    plain = Weights(attention="fp32", mlp="fp32", head="fp32")
    eight = Weights(attention="w8a8", mlp="w8a8", head="w8a8")
    found = {_BASE: Variant(plain), "auto": Variant(Weights())}
    for name in ("bf16", "w8a8", "w8", "int4"):
        each = dict.fromkeys(Weights.model_fields, name)
        found[name] = Variant(Weights.model_validate(each))
    found["w8a8_head_fp32"] = Variant(eight.model_copy(update={"head": "fp32"}))
    found["dtype_bf16"] = Variant(Weights(), dtype="bf16")
    found["kv_int8"] = Variant(plain, kv="int8")
    found["w8a8_kv_int8"] = Variant(eight, kv="int8")
    found["fp32_compiled"] = Variant(plain, compiles=True)
    found["w8a8_compiled"] = Variant(eight, compiles=True)
    found["w8a8_kv_int8_compiled"] = Variant(eight, kv="int8", compiles=True)
    return found


def measure(settings: Settings) -> Measured:
    from benchmarks.lab import formats

    sizes = _QUICK if settings.quick else _FULL
    models = {}
    for name, variant in variants().items():
        models[name] = formats.load(_TARGET, variant)
        settings.progress(f"{name} is loaded: {models[name].held}")
    rows = [row(task, "test", _SEED, at) for task in TASKS for at in range(sizes.rows)]
    written = {}
    for name, loaded in models.items():
        written[name] = formats.answers(loaded, rows)
        settings.progress(f"{name} has answered {len(rows)} rows")
    thought_rows = [row(task, "test", _SEED, at) for at in range(sizes.thought) for task in TASKS]
    thought, tokens = think(models, thought_rows)
    settings.progress("distributions are compared")
    speeds = time_all(models, rows, sizes, settings.progress)
    results = {
        name: {
            "held": models[name].held,
            **told_answers(written[name], written[_BASE], rows),
            **thought[name],
            **speeds[name],
        }
        for name in models
    }
    found = {"rows": len(rows), "thought_rows": len(thought_rows), "thought_tokens": tokens}
    return Measured(results, {}, {"model": "pocket", **found})


def told_answers(
    texts: Sequence[str], base: Sequence[str], rows: Sequence[Row]
) -> dict[str, dict[str, float]]:
    """Rows that are answered exactly, by task and in all, and otherwise than by fp32."""
    right = [text == one.answer for text, one in zip(texts, rows, strict=True)]
    before = [text == one.answer for text, one in zip(base, rows, strict=True)]
    flips = sum(text != other for text, other in zip(texts, base, strict=True))
    gained = sum(now and not was for now, was in zip(right, before, strict=True))
    lost = sum(was and not now for now, was in zip(right, before, strict=True))
    low, high = share_interval(flips, len(rows))
    by_task = {
        task: _share([hit for hit, one in zip(right, rows, strict=True) if one.task == task])
        for task in dict.fromkeys(one.task for one in rows)
    }
    return {
        "answers": {
            "exact": _share(right),
            "flips": round(flips / len(rows), 4),
            "flips_low": round(low, 4),
            "flips_high": round(high, 4),
            "gained": gained,
            "lost": lost,
            "p": round(sign_test(gained, lost), 3),
        },
        "exact": by_task,
    }


def think(
    models: Mapping[str, Loaded], rows: Sequence[Row]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Divergence from fp32 and perplexity over the right answers' tokens, and how many these are.

    Several rows are computed in one step, in the order in which they come.
    """
    from benchmarks.lab.formats import divergence, given, logprobs

    far: dict[str, list[list[float]]] = {name: [] for name in models}  # by row
    lost = dict.fromkeys(models, 0.0)
    whole = [given(models[_BASE], one) for one in rows]
    for at in range(0, len(whole), _PACKED_ROWS):
        some = whole[at : at + _PACKED_ROWS]
        counts = [len(one.answer) for one in some]
        answers = [token for one in some for token in one.answer]
        base = logprobs(models[_BASE], some)
        for name, loaded in models.items():
            own = base if name == _BASE else logprobs(loaded, some)
            apart = iter(divergence(base, own).clamp(min=0.0).tolist())
            far[name] += [list(islice(apart, count)) for count in counts]
            lost[name] -= float(own[range(len(answers)), answers].sum())
    tokens = sum(len(one.answer) for one in whole)
    told = {
        name: {"kl_millinats": _told_divergence(far[name]), "perplexity": exp(lost[name] / tokens)}
        for name in models
    }
    return told, tokens


def _told_divergence(by_row: Sequence[Sequence[float]]) -> dict[str, float]:
    every = [one for some in by_row for one in some]
    sums, counts = [sum(some) for some in by_row], [len(some) for some in by_row]
    low, high = mean_interval(sums, counts, random.Random(_SEED))
    told = {"mean": sum(every) / len(every), "mean_low": low, "mean_high": high}
    told |= {"p99": percentile(every, 99), "max": max(every)}
    return {name: float(f"{1000 * value:.3g}") for name, value in told.items()}


def time_all(
    models: Mapping[str, Loaded],
    rows: Sequence[Row],
    sizes: Sizes,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Medians over rounds in which every variant has its turn, and CPU time beside them."""
    from benchmarks.lab import formats

    first = models[_BASE]
    prompts = [formats.prompt_of(first, one) for one in rows[: max(_BATCHES)]]
    long = [token for one in rows for token in formats.prompt_of(first, one)][:_PROMPT_TOKENS]
    taken: dict[str, dict[str, list[Speed]]] = {name: {} for name in models}
    for number in range(sizes.rounds + 1):  # the first one warms up
        for name, loaded in models.items():
            speeds = {
                f"decode_{batch}": formats.decode_speed(loaded, prompts[:batch], sizes.tokens)
                for batch in _BATCHES
            } | {"prefill": formats.prefill_speed(loaded, long)}
            for what, speed in speeds.items():
                if number:
                    taken[name].setdefault(what, []).append(speed)
        progress(f"speed, round {number} of {sizes.rounds}")
    return {
        name: {what: told_speed(speeds, taken[_BASE][what]) for what, speeds in every.items()}
        for name, every in taken.items()
    }


def told_speed(speeds: Sequence[Speed], base: Sequence[Speed]) -> dict[str, float]:
    """Medians over rounds; `ratio` is to fp32's tokens a second in the same round."""
    ratios = [one.tokens_per_s / own.tokens_per_s for one, own in zip(speeds, base, strict=True)]
    told: dict[str, float] = four_digits(
        {
            "tokens_per_s": median(one.tokens_per_s for one in speeds),
            "cpu_ms_per_token": median(one.cpu_ms_per_token for one in speeds),
            "ratio": median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
        }
    )
    return told


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


if __name__ == "__main__":
    sys.exit(main())
