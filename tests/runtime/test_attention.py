"""Paged attention equals the plain formula, token by token, for every mix of spans."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from runtime.attention import PagedLayer, Span, StepHolder, lay_out, paged_attention
from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.layer_kv import LayerKV
from runtime.paged_kernel import kernel_of

torch.set_num_threads(1)


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    groups: int
    key_dim: int
    value_dim: int
    window: int | None
    softcap: float | None


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 7]),
    key_dim=st.sampled_from([8, 12, 16, 40]),
    value_dim=st.sampled_from([8, 12, 16, 48]),
    window=st.sampled_from([None, None, 1, 5, 24, 100]),
    softcap=st.sampled_from([None, None, 2.0]),
)
lengths = st.one_of(st.integers(1, 20), st.integers(1, 400))
decodes = st.lists(lengths, max_size=9)
chunks = st.lists(
    st.tuples(st.integers(0, 200), st.one_of(st.integers(2, 20), st.integers(2, 150))), max_size=3
)


def world(shape: Shape, spans: list[tuple[int, int]], seed: int, dtype: torch.dtype):
    """Random tokens for spans of (positions before, count), in blocks dealt out at random.

    Returns the step's spans, its query, key and value, a pool that holds what came before, and
    every sequence's keys and values from its first position on.
    """
    torch.manual_seed(seed)
    total = sum(blocks_for(before + count) for before, count in spans)
    free = list(range(total + 3))
    random.Random(seed).shuffle(free)
    dims = (shape.key_dim, shape.value_dim)
    pool = LayerKV(
        *(torch.randn(total + 3, shape.kv_heads, BLOCK_TOKENS, dim).to(dtype) for dim in dims)
    )
    step, packed, whole = [], [], []
    for before, count in spans:
        table = [free.pop() for _ in range(blocks_for(before + count))]
        step.append(Span(before + count, count, table))
        sequence = [torch.randn(shape.kv_heads, before + count, dim).to(dtype) for dim in dims]
        for part, tokens in zip((pool.keys, pool.values), sequence, strict=True):
            for at in range(before):
                part[table[at // BLOCK_TOKENS], :, at % BLOCK_TOKENS] = tokens[:, at]
        packed.append([tokens[:, before:] for tokens in sequence])
        whole.append(sequence)
    key, value = (torch.cat(list(parts), dim=1)[None] for parts in zip(*packed, strict=True))
    query = torch.randn(1, shape.kv_heads * shape.groups, key.shape[2], shape.key_dim).to(dtype)
    return step, query, key, value, pool, whole


def reference(shape: Shape, spans: list[Span], query: torch.Tensor, whole) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v of each token over the positions that it may see, in float64."""
    rows = []
    for span, (keys, values) in zip(spans, whole, strict=True):
        for at in range(span.context - span.count, span.context):
            first = 0 if shape.window is None else max(0, at - shape.window + 1)
            for_heads = []
            for head in range(query.shape[1]):
                own = head // shape.groups
                seen = keys[own, first : at + 1].double()
                scores = seen @ query[0, head, len(rows)].double() * shape.key_dim**-0.5
                if shape.softcap is not None:
                    scores = torch.tanh(scores / shape.softcap) * shape.softcap
                for_heads.append(scores.softmax(-1) @ values[own, first : at + 1].double())
            rows.append(torch.stack(for_heads))
    return torch.stack(rows)[None]


@pytest.fixture(params=["torch", "native"])
def backend(request):
    """Both ways of attending: the library or None."""
    return request.getfixturevalue("native_library") if request.param == "native" else None


def attend(
    shape: Shape, spans: list[Span], query, key, value, pool: LayerKV, library
) -> torch.Tensor:
    step = StepHolder()
    step.layout = lay_out(spans, query.device)
    module = nn.Module()
    module.paged_layer = PagedLayer(pool, step, kernel_of(library, pool))
    out, _ = paged_attention(
        module, query, key, value, None, sliding_window=shape.window, softcap=shape.softcap
    )
    return out


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=shapes, decodes=decodes, chunks=chunks, seed=st.integers(0, 2**20))
def test_every_mix_of_spans_equals_the_plain_formula(backend, shape, decodes, chunks, seed):
    """Decodes of any lengths beside chunks after any context: windows, caps, groups of heads."""
    spans = [(length - 1, 1) for length in decodes] + chunks
    if not spans:
        return
    step, query, key, value, pool, whole = world(shape, spans, seed, torch.float32)
    found = attend(shape, step, query, key, value, pool, backend)
    expected = reference(shape, step, query, whole)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("before", [0, 63, 64, 500])
def test_bf16_is_as_close_as_bf16_allows(backend, before):
    """Half precision loses digits, not terms, on each way that a chunk can be attended."""
    shape = Shape(2, 3, 16, 16, None, None)
    spans = [(40, 1), (333, 1), (before, 70)]
    step, query, key, value, pool, whole = world(shape, spans, 0, torch.bfloat16)
    found = attend(shape, step, query, key, value, pool, backend)
    expected = reference(shape, step, query, whole)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


def test_decodes_of_like_length_are_one_batch_and_others_are_not_padded_to_it():
    """A short decode beside a long one copies its own blocks only."""
    contexts = [33, 1600, 40, 1500, 700, 1]
    spans = [Span(context, 1, list(range(blocks_for(context)))) for context in contexts]
    groups = lay_out(spans, torch.device("cpu")).groups(None)
    assert [group.rows.tolist() for group in groups] == [[1, 3], [4], [0, 2, 5]]
    assert [tuple(group.blocks.shape) for group in groups] == [(2, 100), (1, 44), (3, 3)]


def test_a_windowed_layer_gathers_its_window_and_no_more():
    """However long the context, a window of 100 tokens is at most 8 blocks."""
    spans = [Span(1600, 1, list(range(100))), Span(1600, 40, list(range(100)))]
    layout = lay_out(spans, torch.device("cpu"))
    (group,), (chunk,) = layout.groups(100), layout.chunks(100)
    assert group.blocks.tolist() == [list(range(93, 100))]
    assert chunk.blocks.tolist() == list(range(91, 100))
