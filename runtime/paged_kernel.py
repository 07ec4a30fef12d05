"""Paged attention in C++ (`paged.cpp`): decodes and short spans read their blocks where they lie.

Knows the library's calling convention and which layers it takes; knows no model. What it computes
is what `runtime.attention` computes with torch, which remains the fallback.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from runtime import native
from runtime.kv import BLOCK_TOKENS
from runtime.layer_kv import LayerKV
from runtime.step_layout import Span, StepLayout, lay_out

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("paged.cpp")
# A longer span computes more than it reads, and torch's matrix products are faster at that.
SHORT_TOKENS = 16

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _Layer(ctypes.Structure):
    _fields_ = (
        ("keys", _P),
        ("values", _P),
        ("kv_heads", _I),
        ("key_dim", _I),
        ("value_dim", _I),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", _I),
        ("slots", _P),
        ("spans", _I),
        ("starts", _P),
        ("counts", _P),
        ("contexts", _P),
        ("tables", _P),
        ("blocks", _P),
        ("threads", _I),
    )


class _NativeStep:
    """A layout's short spans as the library reads them; holds the arrays that it points to."""

    __slots__ = ("arrays", "pointer", "struct")

    def __init__(self, layout: StepLayout) -> None:
        short = [
            (start, span)
            for start, span in zip(layout.starts, layout.spans, strict=True)
            if span.count <= SHORT_TOKENS
        ]
        lengths = [len(span.blocks) for _, span in short]
        columns = (
            [start for start, _ in short],
            [span.count for _, span in short],
            [span.context for _, span in short],
            np.cumsum([0, *lengths])[:-1],
            np.concatenate([span.blocks for _, span in short] or [[]]),
        )
        self.arrays = [layout.slots, *(np.ascontiguousarray(one, np.int64) for one in columns)]
        slots, starts, counts, contexts, tables, blocks = (one.ctypes.data for one in self.arrays)
        self.struct = _Step(
            len(layout.slots),
            slots,
            len(short),
            starts,
            counts,
            contexts,
            tables,
            blocks,
            torch.get_num_threads(),
        )
        self.pointer = ctypes.addressof(self.struct)


class PagedKernel:
    """The library, bound to one layer's pool."""

    __slots__ = ("_attend", "_kv", "_pointer", "_struct", "_write")

    def __init__(self, library: ctypes.CDLL, kv: LayerKV) -> None:
        name = _NAMES[kv.keys.dtype]
        self._write: Callable[..., None] = getattr(library, f"write_{name}")
        self._write.argtypes = [_P, _P, _P, _I, _I, _P, _I, _I]
        self._write.restype = None
        self._attend: Callable[..., None] = getattr(library, f"attend_{name}")
        self._attend.argtypes = [_P, _P, _P, _I, _I, _I, _P, _F, _I, _F]
        self._attend.restype = None
        self._kv = kv  # the struct points into its memory
        self._struct = _Layer(
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            kv.kv_heads,
            kv.keys.shape[3],
            kv.values.shape[3],
        )
        self._pointer = ctypes.addressof(self._struct)

    def write(self, layout: StepLayout, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a step's keys and values, [1, KV, T, D] each, into the pool."""
        key, value = _rows(key), _rows(value)
        self._write(
            self._pointer,
            _step(layout).pointer,
            key.data_ptr(),
            key.stride(1),
            key.stride(2),
            value.data_ptr(),
            value.stride(1),
            value.stride(2),
        )

    def attend(
        self,
        layout: StepLayout,
        query: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Fills the rows of all short spans: query [1, H, T, D] -> out [T, H, D], contiguous."""
        query = _rows(query)
        self._attend(
            self._pointer,
            _step(layout).pointer,
            query.data_ptr(),
            query.stride(1),
            query.stride(2),
            query.shape[1] // self._struct.kv_heads,
            out.data_ptr(),
            scale,
            window or 0,
            softcap or 0.0,
        )


def load_library(folder: Path | None = None) -> ctypes.CDLL | None:
    """The compiled library once it has shown that it computes attention; else None, and a log line
    says why. It is kept in `folder`, by default the user's cache."""
    library = native.load(SOURCE, folder or native.cache_folder())
    if library is not None and not _is_right(library):
        log.warning("%s is not used: compiled here, it gives wrong results", SOURCE.name)
        return None
    return library


def kernel_of(library: ctypes.CDLL | None, kv: LayerKV) -> PagedKernel | None:
    """The kernel for a layer, or None where the library does not take its device or shape."""
    keys, values = kv.keys, kv.values
    takes = keys.is_cpu and keys.dtype in _NAMES
    if library is None or not takes or keys.shape[3] % 8 or values.shape[3] % 8:
        return None
    return PagedKernel(library, kv)


def _is_right(library: ctypes.CDLL) -> bool:
    """One small step against the plain formula."""
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 2, 40, 24), (1, 2, 40, 16), (1, 6, 40, 24))
    )
    blocks = torch.zeros(4, 2, BLOCK_TOKENS, 24), torch.zeros(4, 2, BLOCK_TOKENS, 16)
    kernel = PagedKernel(library, LayerKV(*blocks))
    out = torch.empty(40, 6, 16)
    for first, end in ((0, 12), (12, 28), (28, 39), (39, 40)):
        layout = lay_out([Span(end, end - first, [2, 0, 3])], torch.device("cpu"))
        kernel.write(layout, keys[:, :, first:end], values[:, :, first:end])
        kernel.attend(layout, query[:, :, first:end], out[first:end], 0.2, None, None)
    scores = query.view(2, 3, 40, 24) @ keys[0, :, None].transpose(-1, -2) * 0.2
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[0, :, None]
    return torch.allclose(out, expected.reshape(6, 40, 16).transpose(0, 1), atol=1e-4)


def _step(layout: StepLayout) -> _NativeStep:
    return layout.shared.get("native", lambda: _NativeStep(layout))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last dimension lies together; others may have any stride."""
    return x if x.stride(3) == 1 else x.contiguous()
