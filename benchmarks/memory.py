"""How much memory a worker takes while it loads a model, while it answers, and at rest.

The model has the geometry of Qwen2.5-0.5B and random weights, in an fp32 checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.lab import models
from benchmarks.lab.footprint import Footprint, footprint
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import four_digits

_PROMPT_TOKENS = 512
_ANSWER_TOKENS = 8
_KV_TOKENS = 1024
# A weight's bytes, groups' scales included; a worker without loss holds what the format says.
_BYTES = {"fp32": 4.0, "bf16": 2.0, "w8a8": 1.0, "int4": 0.625}
# (format, whether C++ may be compiled)
_VARIANTS = (
    ("fp32", False),
    ("bf16", False),
    ("w8a8", False),
    ("int4", False),
    ("bf16", True),
    ("w8a8", True),
)

ABOUT = About(
    name="memory",
    measures=(
        "Starts one worker for each format of weights with a model of Qwen2.5-0.5B's geometry "
        "(random weights, an fp32 checkpoint of 2 GB made on the spot and kept), lets it answer a "
        f"prompt of {_PROMPT_TOKENS} tokens with {_ANSWER_TOKENS}, and reads its resident memory "
        "from the operating system, pages of files included, in 10^6 bytes: the peak until it is "
        "ready, the peak while it answers, and what stays. `beyond` is the larger peak without "
        "the weights in their format (`weights`, the tied table once) and the KV pool (1,024 "
        "tokens); it holds the interpreter and torch (`base`: a worker at rest whose model has no "
        "size; `files`: the part that is pages of libraries, which workers share), activations, "
        "and what loading needs. `loading_share` is the peak while loading "
        "over what stays, both without `base`."
    ),
    goals=(
        Goal(
            "bf16_beyond",
            400.0,
            "at most",
            "bf16 loads and serves within weights + KV pool + 400 MB",
        ),
        Goal(
            "loading_share",
            1.3,
            "at most",
            "loading takes at most 1.3 x what stays, in every format",
        ),
    ),
)


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    geometry = models.LLAMA_22M if settings.quick else models.QWEN_05B
    folder = models.make(geometry)
    settings.progress(f"{geometry.name} is there")
    short = models.TINY.context // 2
    empty = _worker(models.make(models.TINY), "auto", compiles=False, prompt_tokens=short)
    base = empty.rest
    settings.progress(f"a worker without a model takes {base:.0f} MB")
    results: dict[str, Any] = {"base": base, "files": empty.files}
    for form, compiles in _VARIANTS:
        name = f"{form}_compiled" if compiles else form
        weights = models.matrix_parameters(geometry) * _BYTES[form] / 1e6
        results[name] = told(_worker(folder, form, compiles=compiles), weights, base)
        settings.progress(f"{name} is measured")
    formats = [one for one in results.values() if isinstance(one, dict)]
    values = {
        "bf16_beyond": results["bf16"]["beyond"],
        "loading_share": max(one["loading_share"] for one in formats),
    }
    return Measured(
        four_digits(results),
        four_digits(values),
        {"model": geometry.name, "threads": 1, "kv_tokens": _KV_TOKENS},
    )


def _worker(
    folder: Path, form: str, *, compiles: bool, prompt_tokens: int = _PROMPT_TOKENS
) -> Footprint:
    runtime = {
        "model": str(folder),
        "weights": form,
        "kv_tokens": _KV_TOKENS,
        "threads": 1,
        "compile": "auto" if compiles else "off",
    }
    return footprint(runtime, prompt_tokens, _ANSWER_TOKENS)


def told(found: Footprint, weights: float, base: float) -> dict[str, Any]:
    peak = max(found.peak_loading, found.peak_serving)
    return {
        "peak_loading": found.peak_loading,
        "loaded": found.loaded,
        "peak_serving": found.peak_serving,
        "rest": found.rest,
        "weights": weights,
        "kv": found.kv,
        "beyond": peak - weights - found.kv,
        "loading_share": (found.peak_loading - base) / (found.rest - base),
        "held": ", ".join(f"{name} {count}" for name, count in found.held.items()),
    }


if __name__ == "__main__":
    sys.exit(main())
