"""Compiled linear layers give the plain product, whatever the batch, shape and format."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings, strategies as st

from runtime import quantize
from runtime.int8 import Int8Linear, engines, to_int8
from runtime.native_linear import NativeLinear, adds_bytes_exactly, is_right, takes
from runtime.quantize import ways

CPU = torch.device("cpu")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def library(native_library: ctypes.CDLL) -> ctypes.CDLL:
    if not takes(native_library, 8):
        pytest.skip("needs a CPU that linear.cpp has code for")
    return native_library


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (16, 8), (7, 24), (1, 8), (273, 608), (40, 512)])
@pytest.mark.parametrize(
    ("chosen", "name", "promised"),
    [
        ("fp32", "fp32-native", 1e-6),
        ("auto", "bf16-native", 1e-6),
        ("bf16", "bf16-native", 1e-6),
        ("w8a8", "w8a8-native", 0.015),
    ],
)
def test_each_format_keeps_its_promise(library, chosen, name, promised, shape, dtype, bias):
    """Odd numbers of rows, three dimensions, with and without a bias; the input's dtype returns."""
    weight = (normal(*shape) * 0.05).bfloat16()
    addend = normal(shape[0], seed=1) if bias else None
    x = normal(1, 9, shape[1], seed=2).to(dtype)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if addend is None else addend.double()
    )
    (way,) = [one for one in ways(chosen, weight, dtype, CPU, library) if one.name == name]
    layer = way.build(weight, addend)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (1, 9, shape[0])
    assert apart(y, expected) <= promised + (0.0 if dtype == torch.float32 else 0.006)
    assert (layer.in_features, layer.out_features) == (shape[1], shape[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    eights=st.integers(1, 20),
    tokens=st.integers(1, 20),
    kind=st.sampled_from(["fp32", "bf16", "w8a8"]),
    threads=st.integers(1, 2),
)
def test_a_token_does_not_feel_the_others(library, rows, eights, tokens, kind, threads):
    """Bit for bit: answers stay the same when the batch changes, or the number of threads."""
    weight = normal(rows, 8 * eights).mul_(0.05).bfloat16()
    (way, *_) = ways(kind, weight, torch.float32, CPU, library)
    layer = way.build(weight, normal(rows, seed=3))
    x = normal(tokens, 8 * eights, seed=4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = layer(x)
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "w8a8"])
def test_no_tokens_are_no_rows(library, kind):
    """Nothing is read, nothing is written: an expert that nobody chose, a step without logits."""
    layer = ways(kind, normal(48, 64).bfloat16(), torch.float32, CPU, library)[0].build(
        normal(48, 64).bfloat16(), None
    )
    assert layer(torch.empty(0, 64)).shape == (0, 48)
    assert isinstance(layer, NativeLinear)
    untouched = torch.full((2, 48), 7.0)
    library.linear(
        ctypes.addressof(layer.struct), normal(2, 64).data_ptr(), 0, untouched.data_ptr(), 1
    )
    assert (untouched == 7).all()


def test_two_threads_share_the_rows_of_a_large_layer(library):
    """Small ones stay with one thread; here both have work, and nothing is left out."""
    weight = normal(1001, 512).mul_(0.05).bfloat16()
    for kind in ("fp32", "bf16", "w8a8"):
        layer = ways(kind, weight, torch.float32, CPU, library)[0].build(weight, None)
        x = normal(5, 512, seed=1)
        alone = layer(x)
        torch.set_num_threads(2)
        try:
            assert torch.equal(layer(x), alone)
        finally:
            torch.set_num_threads(1)


@pytest.mark.skipif("fbgemm" not in engines(), reason="this torch has no FBGEMM")
def test_bytes_are_multiplied_as_fbgemm_multiplies_them(library):
    """The same integers, scales and exact sums: one format, two ways of computing it."""
    weight = normal(96, 256).mul_(0.05)
    integers, scales = to_int8(weight, paired=True)
    ours = NativeLinear(library, integers, None, scales)
    theirs = Int8Linear(integers, scales, None, engine="fbgemm", wide=False)
    x = normal(11, 256, seed=1)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(eights=st.integers(1, 70), tokens=st.integers(1, 9), sign=st.sampled_from([-1, 1]))
def test_sums_of_bytes_are_exact_at_the_worst_weights(library, eights, tokens, sign):
    """Full bytes on both sides, all of one sign: pairs of products must not overflow 16 bits."""
    features = 8 * eights
    weight = torch.full((16, features), float(sign))
    integers, scales = to_int8(weight, paired=not adds_bytes_exactly(library))
    layer = NativeLinear(library, integers, None, scales)
    y = layer(torch.ones(tokens, features))
    expected = integers.double().sum(1) * scales
    assert torch.allclose(y, expected.float().expand_as(y), rtol=1e-6)


def test_what_is_not_finite_is_not_hidden(library):
    """A row of zeros gives zeros, a NaN or an infinity gives NaN, and only in its own token."""
    layer = ways("w8a8", normal(32, 64), torch.float32, CPU, library)[0].build(normal(32, 64), None)
    x = normal(4, 64, seed=1)
    x[1] = 0
    x[2, 5] = float("nan")
    x[3, 7] = float("inf")
    y = layer(x)
    assert torch.isfinite(y[0]).all()
    assert (y[1] == 0).all()
    assert torch.isnan(y[2:]).all()


def test_weights_of_bf16_keep_half_the_memory_without_loss(library):
    """`auto` offers bf16 only where the checkpoint's values are those of bf16."""
    weight = normal(64, 64)
    names = [one.name for one in ways("auto", weight, torch.float32, CPU, library)]
    assert "bf16-native" not in names
    names = [one.name for one in ways("auto", weight.bfloat16(), torch.float32, CPU, library)]
    assert names[:2] == ["bf16-native", "fp32-native"]


def test_inputs_that_are_not_in_eights_stay_with_torch(library):
    for chosen in ("auto", "w8a8"):
        found = ways(chosen, normal(16, 36), torch.float32, CPU, library)
        assert found
        assert not [one.name for one in found if "native" in one.name]


def test_formats_take_the_memory_that_they_promise(library):
    weight = (normal(512, 1024) * 0.05).bfloat16()
    for chosen, bytes_each in (("fp32", 4.0), ("bf16", 2.0), ("w8a8", 1.01)):
        layer = ways(chosen, weight, torch.float32, CPU, library)[0].build(weight, None)
        assert layer.held_bytes <= bytes_each * weight.numel()


def test_a_library_that_computes_wrongly_is_noticed(library):
    """The check at start compares with the plain formula: here every result is one too large."""

    class Wrong:
        multiplies = library.multiplies

        @staticmethod
        def linear(layer: int, x: int, tokens: int, y: int, threads: int) -> None:
            library.linear(layer, x, tokens, y, threads)
            ctypes.cast(y, ctypes.POINTER(ctypes.c_float))[0] += 1

    assert is_right(library)
    assert not is_right(Wrong())  # type: ignore[arg-type]


class AVX512:
    """The library as on a CPU where others may have wider vectors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def uses_widest(self) -> int:
        return 0

    def __getattr__(self, name: str):
        return getattr(self._library, name)


@pytest.mark.parametrize("chosen", ["fp32", "auto", "bf16", "w8a8"])
def test_small_layers_are_not_measured(library, chosen):
    """Their cost is the call, which the compiled step does without."""
    wider = AVX512(library)
    way = quantize.choose(chosen, normal(32, 64), torch.float32, CPU, library=wider)
    assert way is not None
    assert way.name.endswith("-native")


def test_large_layers_are_measured_where_others_may_be_faster(library, monkeypatch):
    """The fastest is taken, and another one than ours only if it is much faster."""
    asked = []

    def fastest(layers, dtypes, **how):
        asked.append((len(layers), how))
        return 1

    monkeypatch.setattr(quantize, "fastest", fastest)
    wider = AVX512(library)
    weight = normal(640, 648).bfloat16()
    way = quantize.choose("w8a8", weight, torch.float32, CPU, library=wider)
    found = ways("w8a8", weight, torch.float32, CPU, wider)
    assert way is not None
    assert way.name == found[1].name
    assert asked == [(len(found), {"clearly": 0.7})]


def test_without_the_library_nothing_is_native():
    found = quantize.choose("w8a8", normal(640, 640).bfloat16(), torch.float32, CPU)
    assert found is not None
    assert "native" not in found.name
