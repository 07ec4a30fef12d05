"""Linear layers multiplied by our own compiled code (`linear.cpp`), weights in order of reading.

Knows the library's layouts and calling convention; knows no model and no format's rounding. Legend:
T tokens, K features in, N features out, G groups of 16 rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from runtime.linear import PackedLinear, small_runs
from runtime.pages import zeros

GROUP = 16
# Inputs come in eights, the width of a vector.
FEATURES = 8
# Calling a layer of no more weights takes as long as multiplying.
_SMALL_WEIGHTS = 2**18
# Activations are bytes around this.
_MIDDLE = 128
_P, _I = ctypes.c_void_p, ctypes.c_int64
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class LinearStruct(ctypes.Structure):
    """A layer as the library reads it."""

    _fields_ = (
        ("format", _I),
        ("rows", _I),
        ("columns", _I),
        ("unrounded", _I),
        ("weight", _P),
        ("scales", _P),
        ("middles", _P),
        ("bias", _P),
    )


class NativeLinear(PackedLinear):
    """fp32 or bf16 weights with activations and sums in fp32, or int8 on both sides.

    In int8 each token has a scale of its own and sums are exact, as in `runtime.int8`. Whatever the
    format, a token's result does not depend on the other tokens.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
    ) -> None:
        """weight [N, K] fp32, bf16 or int8, K in eights; scales [N] of int8."""
        rows, features = weight.shape
        super().__init__(features, rows, None if bias is None else bias.float().contiguous())
        self._run: Any = library.linear
        self._packed = _pack(weight)
        self._scales = None if scales is None else scales.float().contiguous()
        self._middles = None
        if weight.dtype == torch.int8:
            self._middles = _middles(weight)
        self.struct = LinearStruct(
            format=_FORMATS[weight.dtype],
            rows=rows,
            columns=features,
            weight=self._packed.data_ptr(),
            scales=_pointer(self._scales),
            middles=_pointer(self._middles),
            bias=_pointer(self.bias),
        )
        self._address = ctypes.addressof(self.struct)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float().contiguous()
        y = torch.empty(rows.shape[0], self.out_features)
        self._run(self._address, rows.data_ptr(), len(rows), y.data_ptr(), torch.get_num_threads())
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def held_bytes(self) -> int:
        beside = [one for one in (self._scales, self._middles) if one is not None]
        return self._packed.nbytes + sum(one.nbytes for one in beside)


def bind(library: ctypes.CDLL) -> None:
    """Tells ctypes the types of the library's functions for linear layers."""
    library.multiplies.restype = _I
    library.uses_widest.restype = _I
    library.linear.argtypes = [_P, _P, _I, _P, _I]
    library.linear.restype = None


def takes(library: ctypes.CDLL | None, features_in: int) -> bool:
    """Whether the library, compiled for this CPU, multiplies layers with so many inputs."""
    return library is not None and library.multiplies() > 0 and features_in % FEATURES == 0


def adds_bytes_exactly(library: ctypes.CDLL) -> bool:
    """Whether this CPU adds four products of bytes in 32 bits, any bytes."""
    return bool(library.multiplies() > 1)


def is_fastest(library: ctypes.CDLL, weights: int) -> bool:
    """Whether a layer of so many weights is held natively without measuring.

    On CPUs without AVX-512 nothing else came near (docs/log.md). Small layers cost the call, and
    the compiled step makes none.
    """
    return bool(library.uses_widest()) or weights <= _SMALL_WEIGHTS


def is_right(library: ctypes.CDLL) -> bool:
    """Small products of each format against the plain formula; True where there is no code."""
    if not takes(library, FEATURES):
        return True
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-64, 64, (41, 72), generator=generator)
    bias = torch.randint(-9, 9, (41,), generator=generator).float()
    for tokens in (1, 2, 7, 13):
        x = torch.randint(-126, 127, (tokens, 72), generator=generator).float()
        x[:, 0] = 127
        expected = x @ weight.t().float() + bias
        scales = torch.ones(41)
        for layer in (
            NativeLinear(library, weight.float(), bias),
            NativeLinear(library, weight.bfloat16(), bias),
            NativeLinear(library, weight.to(torch.int8), bias, scales),
        ):
            if not torch.allclose(layer(x), expected, rtol=1e-5):
                return False
    return True


def _pack(weight: torch.Tensor) -> torch.Tensor:
    rows, features = weight.shape
    groups = -(-rows // GROUP)
    filled = weight.new_zeros(groups * GROUP, features)
    filled[:rows] = weight
    if weight.dtype == torch.int8:  # [G, K / 4, 16, 4]
        ordered = filled.view(groups, GROUP, features // 4, 4).transpose(1, 2)
    elif weight.dtype == torch.bfloat16:  # [G, K, 8, 2]: rows r and r + 8
        ordered = filled.view(groups, 2, GROUP // 2, features).permute(0, 3, 2, 1)
    else:  # [G, K, 16]
        ordered = filled.view(groups, GROUP, features).transpose(1, 2)
    return zeros(tuple(ordered.shape), weight.dtype, weight.device).copy_(ordered)


def _middles(integers: torch.Tensor) -> torch.Tensor:
    """[N] int32: what each row gives for a token whose bytes are all in the middle."""
    sums = [integers[rows].float().sum(1) for rows in small_runs(integers)]  # exact below 2^24
    return torch.cat(sums).to(torch.int32) * _MIDDLE


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
