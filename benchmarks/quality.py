"""What each format of weights and of the KV cache costs in answers, and what it gives in speed.

The model is pocket. Every format answers the same held-out rows; fp32 is what they are compared
with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.lab.report import About, Measured, Settings, run
from pocket.tasks import TASKS, Row, row
from policies.schema import Weights

if TYPE_CHECKING:
    from benchmarks.lab.formats import Loaded, Speed, Variant

ABOUT = About(
    name="quality",
    measures=(
        "Loads pocket in each format of weights (all parts alike, and eight bits with the output "
        "layer left alone), with activations in bf16, and with the KV cache in eight bits. Every "
        "variant answers the same held-out rows of all tasks, greedy: exact matches, and how many "
        "answers are another text than in fp32 (flips). Over the right answers, given token by "
        "token, it measures the Kullback-Leibler divergence from fp32's distribution (nats a "
        "token, mean and largest) and perplexity. Speed is measured beside, the variants in turns: "
        "decoding 1 and 8 sequences, and a prompt of 512 tokens, in tokens a second and CPU "
        "milliseconds a token."
    ),
)

_BASE = "fp32"
_TARGET = Path(__file__).parent.parent / "pocket" / "target"
_SEED = 3
_PROMPT_TOKENS = 512
_BATCHES = (1, 8)


@dataclass(frozen=True, slots=True)
class Sizes:
    rows: int  # a task
    rounds: int  # of speed
    tokens: int  # of each decoded sequence


_FULL = Sizes(rows=60, rounds=7, tokens=48)
_QUICK = Sizes(rows=2, rounds=1, tokens=8)


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
    return found


def measure(settings: Settings) -> Measured:
    from benchmarks.lab import formats

    sizes = _QUICK if settings.quick else _FULL
    models = {}
    for name, variant in variants().items():
        models[name] = formats.load(_TARGET, variant)
        settings.progress(f"{name} is loaded: {models[name].held}")
    by_task = {task: [row(task, "test", _SEED, at) for at in range(sizes.rows)] for task in TASKS}
    rows = [one for some in by_task.values() for one in some]
    written = {}
    for name, loaded in models.items():
        written[name] = formats.answers(loaded, rows)
        settings.progress(f"{name} has answered {len(rows)} rows")
    thought = think(models, rows)
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
    return Measured(results, {}, {"model": "pocket", "rows": len(rows)})


def told_answers(texts: list[str], base: list[str], rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of rows: answered exactly, by task and in all, and answered otherwise than by fp32."""
    right = [text == one.answer for text, one in zip(texts, rows, strict=True)]
    flips = sum(text != other for text, other in zip(texts, base, strict=True))
    by_task = {
        task: _share([hit for hit, one in zip(right, rows, strict=True) if one.task == task])
        for task in TASKS
    }
    return {
        "answers": {"exact": _share(right), "flips": round(flips / len(rows), 4)},
        "exact": by_task,
    }


def think(models: Mapping[str, Loaded], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Divergence from fp32 and perplexity over the right answers' tokens."""
    from benchmarks.lab.formats import divergence, logprobs

    far: dict[str, list[float]] = {name: [] for name in models}
    lost = dict.fromkeys(models, 0.0)
    tokens = 0
    for one in rows:
        base, answer = logprobs(models[_BASE], one)
        tokens += len(answer)
        for name, loaded in models.items():
            own = base if name == _BASE else logprobs(loaded, one)[0]
            far[name] += divergence(base, own).clamp(min=0.0).tolist()
            lost[name] -= float(own[range(len(answer)), answer].sum())
    return {
        name: {
            "kl_nats": {"mean": sum(far[name]) / tokens, "max": max(far[name])},
            "perplexity": exp(lost[name] / tokens),
        }
        for name in models
    }


def time_all(
    models: Mapping[str, Loaded],
    rows: Sequence[Row],
    sizes: Sizes,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Medians over rounds in which every variant has its turn, and CPU time beside them."""
    from benchmarks.lab import formats

    first = next(iter(models.values()))
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
        name: {
            what: {
                "tokens_per_s": _digits(median(one.tokens_per_s for one in speeds)),
                "cpu_ms_per_token": _digits(median(one.cpu_ms_per_token for one in speeds)),
            }
            for what, speeds in every.items()
        }
        for name, every in taken.items()
    }


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
