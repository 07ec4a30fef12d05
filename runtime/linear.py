"""How a linear layer is held in memory and multiplied: one module for each way, all alike outside.

Knows tensors and torch's kernels; knows no model and no policy. `runtime.quantize` says which way
is right and fastest on this machine. Activations come and go in their own dtype, whatever a kernel
wants inside.

Legend: T tokens, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Engine = Literal["fbgemm", "onednn"]

_RUN_WEIGHTS = 2**17
_FBGEMM_BLOCK = 512


class PackedLinear(nn.Module):
    """x [..., T, K] -> x W^T + b [..., T, N].

    `slices` are the rows of the output that each of the fused layers had, under their names; `way`
    is what `runtime.quantize` calls this one.
    """

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.way = ""
        self.in_features = in_features
        self.out_features = out_features
        self.slices: dict[str, slice] = {}
        self.register_buffer("bias", bias, persistent=False)
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def parts(self) -> list[PackedLinear]:
        """What is held each in a way of its own: itself, or its pieces."""
        return [self]

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights as they are held."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class PlainLinear(PackedLinear):
    """Weights as they are, in the dtype of the activations: any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    @property
    def held_bytes(self) -> int:
        return self.weight.nbytes


class MkldnnLinear(PackedLinear):
    """Weights laid out once for oneDNN, fp32 or bf16: the same sums, without a reorder a call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self._dtype = weight.dtype
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype), self._packed, self.bias, "none", [], ""
        )
        return y.to(x.dtype)

    @property
    def held_bytes(self) -> int:
        held: int = torch.ops.mkldnn._nbytes(self._packed)
        return held


class HalfLinear(PackedLinear):
    """Weights in fp16, activations and sums in fp32 (FBGEMM): half the memory to stream.

    fp16 has more digits than bf16 and a smaller range. A power of two, which costs no digit, moves
    the weights into that range and the activations out of it again; `exponent` is that power.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, exponent: int = 0
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], None)
        self._scale = 2.0**-exponent
        moved = weight.float()
        moved = moved * 2.0**exponent if exponent or not moved.is_contiguous() else moved
        with packing_with("fbgemm"):
            self._packed: Any = torch.ops.quantized.linear_prepack_fp16(moved, _float(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.float()
        if self._scale != 1:
            rows = rows * self._scale
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return y.to(x.dtype)

    @property
    def held_bytes(self) -> int:
        return 2 * fbgemm_features(self.in_features) * self.out_features


class ByteLinear(PackedLinear):
    """Eight-bit weights, one scale a row, activations in bf16 (torch's weight-only kernel)."""

    def __init__(
        self, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__(integers.shape[1], integers.shape[0], _float(bias))
        self._integers = integers.contiguous()
        self._scales = scales.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).bfloat16()
        y = torch._weight_int8pack_mm(rows, self._integers, self._scales)
        return _finish(y, self.bias, x)

    @property
    def held_bytes(self) -> int:
        return self._integers.nbytes + self._scales.nbytes


class Int4Linear(PackedLinear):
    """Four-bit weights in groups along K, each with a scale and a zero; activations in bf16."""

    def __init__(
        self,
        integers: torch.Tensor,
        scales_and_zeros: torch.Tensor,
        bias: torch.Tensor | None,
        group: int,
    ) -> None:
        """integers [N, K] int32 in 0..15, scales_and_zeros [K / group, N, 2] fp32."""
        super().__init__(integers.shape[1], integers.shape[0], _float(bias))
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self._packed: torch.Tensor = pack(integers, 1)
        self._scales = scales_and_zeros.bfloat16().contiguous()
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).bfloat16()
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._packed, self._group, self._scales
        )
        return _finish(y, self.bias, x)

    @property
    def held_bytes(self) -> int:
        return self._packed.nbytes + self._scales.nbytes


class Fp8Linear(PackedLinear):
    """e4m3 on both sides, one scale a row of the weights and a token (`torch._scaled_mm`)."""

    def __init__(
        self, floats: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """floats [N, K] float8_e4m3fn, scales [N] fp32."""
        super().__init__(floats.shape[1], floats.shape[0], bias)
        self.register_buffer("weight", floats.contiguous(), persistent=False)
        self.register_buffer("scales", scales.float()[None].contiguous(), persistent=False)
        self.weight: torch.Tensor
        self.scales: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        largest = torch.finfo(self.weight.dtype).max
        scale = rows.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / largest
        floats = (rows.float() / scale).clamp_(-largest, largest).to(self.weight.dtype)
        y = torch._scaled_mm(floats, self.weight.t(), scale, self.scales, out_dtype=torch.bfloat16)
        return _finish(y, self.bias, x)

    @property
    def held_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes


class PieceLinear(PackedLinear):
    """A layer with very many rows, held in pieces so that none is ever whole in full precision."""

    def __init__(self, pieces: list[PackedLinear]) -> None:
        super().__init__(pieces[0].in_features, sum(one.out_features for one in pieces), None)
        self.pieces = nn.ModuleList(pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([piece(x) for piece in self.pieces], dim=-1)

    @property
    def held_bytes(self) -> int:
        return sum(piece.held_bytes for piece in self.parts)

    @property
    def parts(self) -> list[PackedLinear]:
        return [piece for piece in self.pieces if isinstance(piece, PackedLinear)]


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def _finish(y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """y [T, N] as a kernel gives it -> with the bias, in the shape and the dtype of x."""
    y = y.to(x.dtype)
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[-1])


@contextmanager
def packing_with(name: Engine) -> Iterator[None]:
    """torch keeps the packing engine in a global; it is put back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def fbgemm_features(features_in: int) -> int:
    """FBGEMM fills inputs up to blocks of 512: 896 features take the memory of 1024."""
    return -(-features_in // _FBGEMM_BLOCK) * _FBGEMM_BLOCK


def small_runs(weight: torch.Tensor) -> list[slice]:
    """The rows of a weight in runs that fit into a core's cache, a few copies of them too."""
    return runs(weight.shape[0], max(1, _RUN_WEIGHTS // weight.shape[1]))


def runs(rows: int, most: int) -> list[slice]:
    """All rows as slices of at most so many."""
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]
