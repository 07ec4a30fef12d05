"""Eight-bit integers on both sides of a product: how weights are rounded, and multiplied exactly.

Knows torch's two int8 engines and what CPUs do to sums of bytes; knows no model.

Legend: T tokens, K features in, N features out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

from runtime.linear import Engine, PackedLinear, fbgemm_features, packing_with, small_runs

# Rows of eight-bit integers are u8 inside: the kernels want them without a sign.
_MIDDLE = 128
_INT8_MAX = 127
# Division by a row's largest entry must give no NaN for a row of zeros.
_TINY = 1e-30
# The low half of an activation is worth this much less than the high half.
_HALVES = 254.0


class Int8Linear(PackedLinear):
    """Eight-bit integers on both sides, exact sums, one scale a row of the weights and a token.

    A token's scale is its own, so that its result does not depend on what else is in the batch.
    `wide` gives each token two rows, a high and a low half, which is 15 bits: weights alone are
    rounded then, at twice the work. Integers and scales come from `to_int8`.
    """

    def __init__(
        self,
        integers: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        engine: Engine,
        wide: bool,
    ) -> None:
        """integers [N, K] int8, scales [N] fp32."""
        super().__init__(
            integers.shape[1], integers.shape[0], None if bias is None else bias.float()
        )
        self._wide = wide
        self._held_features = (
            fbgemm_features(self.in_features) if engine == "fbgemm" else self.in_features
        )
        self._multiply = (
            _fbgemm(integers, scales) if engine == "fbgemm" else _onednn(integers, scales)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes each token to +-127, multiplies as integers, and gives the scale back."""
        rows = x.reshape(-1, self.in_features).float()
        low, high = torch.aminmax(rows, dim=-1, keepdim=True)
        largest = torch.maximum(high, low.neg_()).clamp_(min=_TINY).mul_(1 / _INT8_MAX)
        scaled = rows / largest
        if self._wide:
            whole = scaled.round()
            rest = (scaled - whole).mul_(_HALVES)
            above, below = self._multiply(torch.cat([whole, rest])).chunk(2)
            y = torch.add(above, below, alpha=1 / _HALVES).mul_(largest)
        else:
            y = self._multiply(scaled).mul_(largest)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def held_bytes(self) -> int:
        return (self._held_features + 4) * self.out_features


def _fbgemm(integers: torch.Tensor, scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """rows [T, K] fp32 within +-127 -> rows rounded to integers, times the weights, [T, N] fp32."""
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with packing_with("fbgemm"), warnings.catch_warnings():
        # Quantized tensors are to leave torch; this packing takes nothing else so far.
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def run(rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(rows, 1.0, _MIDDLE, packed)
        return y

    return run


def _onednn(integers: torch.Tensor, scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `_fbgemm`, by oneDNN: the faster one where the CPU multiplies bytes natively."""
    packed = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    scales = scales.float()

    def run(rows: torch.Tensor) -> torch.Tensor:
        bytes_ = rows.add(_MIDDLE + 0.5).to(torch.uint8)  # truncation after + 0.5 rounds
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            bytes_, 1.0, _MIDDLE, packed, scales, zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y

    return run


def to_int8(weight: torch.Tensor, *, paired: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K] within +-127 and a scale a row [N], symmetric.

    `paired`: CPUs without a byte dot product add two neighbouring products in 16 bits, which
    255 * (127 + 127) overflows silently. Where the absolute values of each such pair add up to at
    most 128, nothing does; most rows lose half a bit by it, not the whole bit of halving the range.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0])
    for rows in small_runs(weight):
        whole = weight[rows].float()
        sizes = whole.abs()
        largest = sizes.amax(1)
        if paired:
            even = torch.nn.functional.pad(sizes, (0, whole.shape[1] % 2))
            largest = torch.maximum(largest, (even[:, 0::2] + even[:, 1::2]).amax(1))
        scales[rows] = (largest / 127).clamp_(min=1e-30)
        integers[rows] = (whole / scales[rows, None]).round_().clamp_(-127, 127)
    return integers, scales


@cache
def engines() -> tuple[Engine, ...]:
    supported = torch.backends.quantized.supported_engines
    both: tuple[Engine, ...] = ("fbgemm", "onednn")
    return tuple(one for one in both if one in supported)


@cache
def multiplies_exactly(engine: Engine) -> bool:
    """Whether this CPU adds products of the largest bytes without overflowing 16 bits."""
    integers = torch.full((16, 64), 127, dtype=torch.int8)
    layer = Int8Linear(integers, torch.ones(16), None, engine=engine, wide=False)
    found = layer(torch.ones(1, 64))
    return bool((found - 64 * 127).abs().max() < 1)
