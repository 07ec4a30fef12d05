"""Paged attention in C++ (`paged.cpp`): decodes and short spans read their blocks where they lie.

Knows the library's calling convention and which layers it takes; knows no model. What it computes
is what `runtime.attention` computes with torch, which remains the fallback.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import native, native_linear
from runtime.int8_kv import Int8KV
from runtime.kv import BLOCK_TOKENS
from runtime.layer_kv import LayerKV
from runtime.step_layout import SHORT_TOKENS, Span, StepLayout, lay_out

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.cpp")  # which includes paged.cpp
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_PIECE_TOKENS = 2 * SHORT_TOKENS


class _Layer(ctypes.Structure):
    _fields_ = (
        ("keys", _P),
        ("values", _P),
        ("kv_heads", _I),
        ("key_dim", _I),
        ("value_dim", _I),
        ("key_codes", _P),
        ("key_scales", _P),
        ("value_codes", _P),
        ("value_scales", _P),
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
        ("owns", _P),
        ("tails", _P),
        ("complete", _I),
        ("complete_blocks", _P),
        ("complete_tails", _P),
        ("threads", _I),
    )


class _NativeStep:
    """A layout's spans of up to `longest` tokens as the library reads them; holds the arrays that
    it points to."""

    __slots__ = ("arrays", "pointer", "struct")

    def __init__(self, layout: StepLayout, longest: int) -> None:
        short = [
            (start + first, number, Span(span.context - span.count + end, end - first, span.blocks))
            for number, (start, span) in enumerate(zip(layout.starts, layout.spans, strict=True))
            if span.chain_tokens <= longest
            for first, end in _pieces(span.count)
        ]
        step = layout.tails
        own = [step.slots[number] if step else [] for _, number, _ in short]
        complete = step.complete if step else []
        tables = [span.blocks for _, _, span in short]
        columns: list[Any] = [
            step.targets if step else layout.slots,
            [start for start, _, _ in short],
            [span.count for _, _, span in short],
            [span.context for _, _, span in short],
            _offsets(tables),
            list(chain.from_iterable(tables)),
            _offsets(own),
            list(chain.from_iterable(own)),
            [tail.block for tail in complete],
            [tail.slot for tail in complete],
        ]
        self.arrays = [np.ascontiguousarray(one, np.int64) for one in columns]
        slots, starts, counts, contexts, at, blocks, owns, tails, full, full_tails = (
            one.ctypes.data for one in self.arrays
        )
        self.struct = _Step(
            tokens=len(layout.slots),
            slots=slots,
            spans=len(short),
            starts=starts,
            counts=counts,
            contexts=contexts,
            tables=at,
            blocks=blocks,
            owns=owns,
            tails=tails,
            complete=len(complete),
            complete_blocks=full,
            complete_tails=full_tails,
            threads=torch.get_num_threads(),
        )
        self.pointer = ctypes.addressof(self.struct)


def _pieces(tokens: int) -> Iterator[tuple[int, int]]:
    """A long span's rows in parts, so that threads share it."""
    for first in range(0, tokens, _PIECE_TOKENS):
        yield first, min(first + _PIECE_TOKENS, tokens)


def _offsets(lists: list[list[int]]) -> list[int]:
    """Where each begins when they stand behind one another."""
    return list(accumulate(map(len, lists[:-1]), initial=0)) if lists else []


class PagedKernel:
    """The library, bound to one layer's pool."""

    __slots__ = ("_attend", "_memory", "_struct", "_write", "pointer")

    def __init__(self, library: ctypes.CDLL, kv: LayerKV | Int8KV) -> None:
        # What is written token by token: the pool, or the tails beside an int8 pool.
        whole = kv.tails if isinstance(kv, Int8KV) else kv
        name = _NAMES[whole.keys.dtype]
        self._write: Callable[..., None] = getattr(library, f"write_{name}")
        self._write.argtypes = [_P, _P, _P, _I, _I, _P, _I, _I]
        self._write.restype = None
        self._attend: Callable[..., None] = getattr(library, f"attend_{name}")
        self._attend.argtypes = [_P, _P, _P, _I, _I, _I, _P, _F, _I, _F]
        self._attend.restype = None
        self._memory = (whole, kv)  # the struct points into it
        self._struct = _Layer(
            keys=whole.keys.data_ptr(),
            values=whole.values.data_ptr(),
            kv_heads=whole.kv_heads,
            key_dim=whole.keys.shape[3],
            value_dim=whole.values.shape[3],
        )
        if isinstance(kv, Int8KV):
            self._struct.key_codes = kv.keys.data_ptr()
            self._struct.key_scales = kv.key_scales.data_ptr()
            self._struct.value_codes = kv.values.data_ptr()
            self._struct.value_scales = kv.value_scales.data_ptr()
        self.pointer = ctypes.addressof(self._struct)

    def write(self, layout: StepLayout, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a step's keys and values, [1, KV, T, D] each, into the pool."""
        key, value = _rows(key), _rows(value)
        self._write(
            self.pointer,
            step_of(layout).pointer,
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
            self.pointer,
            step_of(layout).pointer,
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
    if library is not None:
        native_linear.bind(library)
    if library is not None and not (_is_right(library) and native_linear.is_right(library)):
        log.warning("%s is not used: compiled here, it gives wrong results", SOURCE.name)
        return None
    return library


def kernel_of(library: ctypes.CDLL | None, kv: LayerKV | Int8KV) -> PagedKernel | None:
    """The kernel for a layer, or None where the library does not take its device or shape."""
    whole = kv.tails if isinstance(kv, Int8KV) else kv
    takes = whole.keys.is_cpu and whole.keys.dtype in _NAMES
    if library is None or not takes or whole.keys.shape[3] % 8 or whole.values.shape[3] % 8:
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


def step_of(layout: StepLayout, longest: int = SHORT_TOKENS) -> _NativeStep:
    """The step with its spans of up to `longest` tokens; longer ones are attended by torch."""
    shared = layout.tails.shared if layout.tails is not None else layout.shared
    return shared.get(("native", longest), lambda: _NativeStep(layout, longest))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last dimension lies together; others may have any stride."""
    return x if x.stride(3) == 1 else x.contiguous()
