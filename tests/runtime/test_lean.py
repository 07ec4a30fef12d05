"""A draft without its class around it says what the class says, or is left alone."""

from __future__ import annotations

import pytest
import torch

from runtime.attention import Span, lay_out
from runtime.lean import lean_step
from runtime.loading import load_model
from tests.runtime.tiny_models import FAMILIES, WINDOW, write_model


def logits_of(model, ids: list[int], parts: list[tuple[int, int]]) -> torch.Tensor:
    """All rows of two sequences of the same tokens, computed part by part, packed."""
    tables = [[0, 2, 4], [5, 3, 1]]
    rows = []
    for first, end in parts:
        spans = [Span(end, end - first, table) for table in tables]
        layout = lay_out(spans, model.device, model.scratch_slot)
        positions = [*range(first, end)] * 2
        step = model.forward(ids[first:end] * 2, positions, layout, list(range(2 * (end - first))))
        rows.append(step.view(2, end - first, -1))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "llama3_rope"])
def test_lean_steps_give_the_logits_of_the_class(family, tmp_path):
    """In chunks and token by token, over windows, of several sequences at once."""
    model, _ = load_model(write_model(tmp_path, *FAMILIES[family]), kv_tokens=96)
    ids = torch.randint(0, 256, (WINDOW + 20,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [(0, 17), (17, 18), (18, 21), (21, 40), (40, 41), (41, len(ids))]
    expected = logits_of(model, ids, parts)
    model.decoder = lean_step(model)
    assert model.decoder is not None
    assert torch.allclose(logits_of(model, ids, parts), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "olmo2", "phi3", "granite", "glm4"])
def test_models_of_another_kind_keep_their_class(family, tmp_path):
    """They are not run as what they are not: normed queries, other activations, other factors."""
    model, _ = load_model(write_model(tmp_path, *FAMILIES[family]), kv_tokens=96)
    assert lean_step(model) is None
    assert model.decoder is None
