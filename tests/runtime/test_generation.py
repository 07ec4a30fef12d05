"""What a model's makers recommend, as far as requests can say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.generation import recommended_sampling


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 2},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"temperature": None, "top_p": "0.9", "top_k": True, "repetition_penalty": 0}, {}),
        ({"temperature": 40, "min_p": 0.05}, {"min_p": 0.05}),
    ],
)
def test_generation_config_is_told_as_fields_of_a_request(
    tmp_path: Path, config: dict[str, Any] | None, told: dict[str, float]
) -> None:
    """Greedy is temperature 0; what is no number or out of a request's range is left out."""
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert recommended_sampling(tmp_path) == told
