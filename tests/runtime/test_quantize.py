"""Each way of holding a linear layer gives what its format promises, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from runtime import int8, quantize
from runtime.int8 import Int8Linear, to_int8
from runtime.linear import Fp8Linear, HalfLinear, PieceLinear
from runtime.quantize import FormatUnavailable, half_exponent, to_int4, ways

CPU = torch.device("cpu")
ENGINES = int8.engines()
# Relative difference (Frobenius) from the exact product, for normal weights and inputs.
PROMISED = {"auto": 1e-6, "fp32": 1e-6, "bf16": 2e-6, "w8a8": 0.015, "w8": 0.012, "int4": 0.1}
NEEDS_ENGINES = pytest.mark.skipif(not ENGINES, reason="this torch has no int8 engine")
torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (16, 32), (272, 608), (7, 33), (1, 1)])
@pytest.mark.parametrize("chosen", list(PROMISED))
def test_every_way_of_a_format_keeps_its_promise(chosen, shape, dtype, bias):
    """Odd shapes, three dimensions, with and without a bias; inputs come back in their dtype."""
    weight = (normal(*shape) * 0.05).bfloat16()
    addend = normal(shape[0], seed=1) if bias else None
    x = normal(1, 9, shape[1], seed=2).to(dtype)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if addend is None else addend.double()
    )
    found = ways(chosen, weight, dtype, CPU)
    assert found or (chosen == "int4" and (shape[0] % 16 or shape[1] % 32))
    for way in found:
        layer = way.build(weight, addend)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (1, 9, shape[0])
        limit = PROMISED[chosen] + (0.0 if dtype == torch.float32 else 0.006)
        assert apart(y, expected) <= limit, way.name
        assert (layer.in_features, layer.out_features) == (shape[1], shape[0])


def test_the_formats_take_the_memory_that_they_promise():
    weight = (normal(512, 1024) * 0.05).bfloat16()
    bytes_each = {"fp16-fbgemm": 2.0, "fp32-mkldnn": 4.0, "int4-torch": 0.63}
    for chosen in PROMISED:
        for way in ways(chosen, weight, torch.float32, CPU):
            limit = bytes_each.get(way.name, 4.0 if chosen in quantize.LOSSLESS else 1.01)
            assert way.build(weight, None).held_bytes <= limit * weight.numel(), way.name


@NEEDS_ENGINES
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    features_in=st.integers(1, 70).map(lambda n: 4 * n),
    tokens=st.integers(1, 35),
    sign=st.sampled_from([-1, 1, 0]),
    seed=st.integers(0, 10**6),
)
def test_integer_sums_are_exact_at_the_worst_weights(engine, features_in, tokens, sign, seed):
    """Without a byte dot product a CPU adds pairs in 16 bits, which 255 * (127 + 127) overflows
    without a word: weights of one size gave results that were wrong by half."""
    generator = torch.Generator().manual_seed(seed)
    weight = 1 + 0.05 * torch.rand(16, features_in, generator=generator)
    if sign == 0:
        weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    else:
        weight *= sign
    paired = not int8.multiplies_exactly(engine)
    integers, scales = to_int8(weight, paired=paired)
    rows = torch.randint(-127, 128, (tokens, features_in), generator=generator)
    rows[::2] = 127
    rows[:, 0] = 127  # the scale of each token is 1
    layer = Int8Linear(integers, torch.ones_like(scales), None, engine=engine, wide=False)
    exact = rows.long() @ integers.long().t()
    assert torch.equal(layer(rows.float()).round().long(), exact)


@NEEDS_ENGINES
def test_pairs_lose_less_than_the_whole_bit_that_halving_the_range_would():
    """Normal weights: the pair rule sits between eight bits and seven."""
    weight = normal(256, 1024)
    lost = {}
    for name, (integers, scales) in {
        "eight": to_int8(weight, paired=False),
        "pairs": to_int8(weight, paired=True),
    }.items():
        lost[name] = apart(integers.float() * scales[:, None], weight)
        if name == "pairs":
            sums = integers.int().abs()
            assert int((sums[:, 0::2] + sums[:, 1::2]).max()) <= 128
    assert lost["eight"] < lost["pairs"] < 1.7 * lost["eight"]


@pytest.mark.parametrize("chosen", ["w8a8", "w8"])
def test_a_token_does_not_depend_on_its_batch(chosen):
    """Alone, among others, beside an outlier a thousand times as large: the same bits."""
    weight = normal(96, 64) * 0.05
    x = normal(33, 64, seed=2)
    x[5] *= 1000
    for way in ways(chosen, weight, torch.float32, CPU):
        if way.name == "w8-torch":
            continue  # bf16 activations, whose blocking may differ
        layer = way.build(weight, None)
        together = layer(x)
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(together, alone), way.name


@pytest.mark.parametrize("chosen", list(PROMISED))
def test_zeros_give_the_bias_and_bad_rows_stay_among_themselves(chosen):
    """A scale of zero divides nothing; a row that is not a number spoils no other row."""
    weight = (normal(32, 64) * 0.05).bfloat16()
    bias = normal(32, seed=1)
    x = normal(4, 64, seed=2)
    x[1] = 0
    spoiled = x.clone()
    spoiled[3] = float("nan")
    for way in ways(chosen, weight, torch.float32, CPU):
        layer = way.build(weight, bias)
        y = layer(x)
        assert torch.allclose(y[1], bias, atol=1e-6), way.name
        again = layer(spoiled)
        assert torch.equal(again[:3], y[:3]), way.name
        assert again[3].isnan().all(), way.name


def test_bf16_weights_fit_into_fp16_without_loss():
    """Also those that lie below fp16's own range; arbitrary fp32 weights do not fit."""
    for scale in (1.0, 1e-3, 1e-6, 1e6):
        weight = (normal(64, 256) * scale).bfloat16()
        exponent = half_exponent(weight)
        assert exponent is not None
        moved = weight.float() * 2.0**exponent
        back = moved.half().float() * 2.0**-exponent
        assert apart(back, weight) < 2**-24
        x = normal(3, 256, seed=1)
        layer = HalfLinear(weight, None, exponent=exponent)
        assert apart(layer(x), x.double() @ weight.double().t()) < 1e-6
    assert half_exponent(normal(64, 256)) is None
    assert half_exponent(torch.tensor([[1.0, float("inf")]])) is None
    assert half_exponent(torch.zeros(2, 2)) == 0


def test_fp32_weights_are_never_rounded_by_auto():
    """Whatever auto takes for weights that only fp32 holds keeps them."""
    weight = normal(64, 256)
    assert all(way.name.startswith("fp32") for way in ways("auto", weight, torch.float32, CPU))


def test_groups_of_four_bits_hold_their_ends_exactly():
    """The smallest and the largest weight of each group are among its sixteen values."""
    weight = normal(16, 64)
    integers, pairs = to_int4(weight)
    assert int(integers.min()) == 0
    assert int(integers.max()) == 15
    scales, zeros = pairs[..., 0].t(), pairs[..., 1].t()  # [N, groups]
    grouped = integers.view(16, 2, 32)
    back = (grouped - 8) * scales[..., None] + zeros[..., None]
    step = scales.max()
    assert float((back.view_as(weight) - weight).abs().max()) <= 0.6 * float(step)


def test_a_head_with_many_rows_is_held_in_pieces():
    """The pieces give what the whole layer gives, bias and all."""
    weight, bias, x = normal(160, 64), normal(160, seed=1), normal(1, 5, 64, seed=2)
    held = quantize.hold("fp32", weight, bias, torch.float32, CPU, prefer=["fp32"], piece_rows=48)
    assert held is not None
    layer, name = held
    assert name == "fp32"
    assert isinstance(layer, PieceLinear)
    assert [piece.out_features for piece in layer.pieces] == [48, 48, 48, 16]
    assert apart(layer(x), torch.nn.functional.linear(x, weight, bias)) < 1e-6
    assert layer.held_bytes == 4 * weight.numel()


def test_the_choice_is_one_of_the_ways_and_is_made_once():
    """Two layers of one shape are held alike; a preferred way is taken without measuring."""
    weight = (normal(64, 96) * 0.05).bfloat16()
    names = {way.name for way in ways("auto", weight, torch.float32, CPU)}
    first = quantize.choose("auto", weight, torch.float32, CPU)
    again = quantize.choose("auto", weight + 1, torch.float32, CPU)
    assert first is not None
    assert again is not None
    assert first.name == again.name
    for name in names:
        chosen = quantize.choose("auto", weight, torch.float32, CPU, prefer=[name])
        assert chosen is not None
        assert chosen.name == name


def test_fp8_multiplies_with_one_scale_a_row_and_a_token():
    """The arithmetic of the GPU's format, by the CPU's slow kernel for it."""
    weight, bias = normal(64, 96) * 0.05, normal(64, seed=1)
    layer = quantize._fp8(weight, bias)
    assert isinstance(layer, Fp8Linear)
    x = normal(1, 17, 96, seed=2)
    try:
        y = layer(x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 product on this CPU: {error}")
    assert apart(y, torch.nn.functional.linear(x, weight, bias)) < 0.05


@pytest.mark.parametrize(
    ("chosen", "device", "reason"),
    [
        ("fp8", "cpu", "need a GPU with fp8 arithmetic"),
        ("w8a8", "cuda", "use fp8 or bf16"),
        ("int4", "cuda", "use fp8 or bf16"),
    ],
)
def test_a_format_that_a_device_lacks_is_refused_with_another_one(chosen, device, reason):
    with pytest.raises(FormatUnavailable, match=reason):
        quantize.check(chosen, torch.device(device))
