"""How a model's makers sample from it: what generation_config.json says, for clients to take up.

Requests that name nothing get OpenAI's defaults all the same; `/v1/models` tells these.
"""

from __future__ import annotations

from pathlib import Path

from cache.tokenizer_files import read_json

# Field -> the values that a request may carry (wire.py).
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 100.0),
}


def recommended_sampling(folder: Path) -> dict[str, float]:
    """Fields of a request; empty where the model's files say nothing. `do_sample: false` is
    temperature 0, whatever else the file holds."""
    config = read_json(folder / "generation_config.json")
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    return {
        name: value
        for name, (least, most) in _RANGES.items()
        if isinstance(value := config.get(name), int | float)
        and not isinstance(value, bool)
        and least <= value <= most
    }
