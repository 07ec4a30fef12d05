"""Checkpoints that others have quantized, read by transformers' quantizers and their packages.

Knows which methods are let through and what they need; knows no surgery. Where a quantizer can give
plain weights, it does, and `runtime.weights` says how they are held; torchao's layers stay
torchao's unless another format than auto is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from runtime.model import ModelRefused
from runtime.proof import refusing
from runtime.surgery import Plan

# quant_method -> what has to be installed beside transformers
_NEEDS = {
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "gptq": "gptqmodel and optimum",
    "awq": "gptqmodel and accelerate",
}
_PLAIN = "use a checkpoint in fp32, fp16 or bf16"


def method_of(config: Any, folder: Path) -> str | None:
    """The method that quantized a checkpoint, None for a plain one. Raises ModelRefused for a
    method that is not let through."""
    for part in (config, config.get_text_config()):
        told: Any = getattr(part, "quantization_config", None)
        if not told:
            continue
        method = told.get("quant_method") if isinstance(told, dict) else told.quant_method
        method = str(getattr(method, "value", method))
        if method not in _NEEDS:
            raise ModelRefused(
                f"{folder}: the checkpoint is quantized by {method!r}, of which only "
                f"{', '.join(sorted(_NEEDS))} are supported; {_PLAIN}, and runtime.weights for a "
                "smaller format"
            )
        return method
    return None


def read_quantized(folder: Path, config: Any, plan: Plan, method: str) -> Any:
    """Module and loading report, the module in memory and on the device of the plan."""
    more: dict[str, Any] = {}
    if method == "compressed-tensors":
        with refusing(folder, f"the checkpoint is quantized by {method}", _advice(method)):
            more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with refusing(
        folder,
        f"the checkpoint is quantized by {method} and cannot be loaded here",
        _advice(method),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=plan.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
        return loaded[0].to(plan.device), loaded[1]


def _advice(method: str) -> str:
    return f"install {_NEEDS[method]}, or {_PLAIN}"
