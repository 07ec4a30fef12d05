"""Number formats of a linear layer's weights, and which way of holding each is right and fastest.

Knows weights as tensors; knows no model and no policy file. A format says what values the weights
take; for most there are several ways of holding and multiplying them (`runtime.linear`), and which
one wins depends on the CPU: it is measured once for each shape, and kept (`runtime.choices`).

Legend: N features out, K features in.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from policies.schema import WeightFormat
from runtime.choices import Choices
from runtime.int8 import Int8Linear, engines, multiplies_exactly, to_int8
from runtime.linear import (
    ByteLinear,
    Engine,
    Fp8Linear,
    HalfLinear,
    Int4Linear,
    MkldnnLinear,
    PackedLinear,
    PieceLinear,
    PlainLinear,
    runs,
    small_runs,
)
from runtime.native_linear import NativeLinear, adds_bytes_exactly, is_fastest, takes
from runtime.timing import fastest

LOSSLESS: tuple[WeightFormat, ...] = ("auto", "fp32", "bf16")
ROUNDED: tuple[WeightFormat, ...] = ("w8a8", "w8", "int4", "fp8")
INT4_GROUP = 32
# With fewer or odd ones torch's weight-only kernel ends the process (a division by zero).
_BYTE_FEATURES = 32

# A layer with more rows is held in pieces: packing wants each in fp32 and packed at the same time.
PIECE_ROWS = 8192

_NATIVE = "-native"
# One layer held otherwise and the whole model has no compiled step: others must win by this much.
_CLEARLY_FASTER = 0.7

# A layer with more rows is compared by so many of them.
_SAMPLE_ROWS = 4096
# Fp32's own rounding: what is lost below it cannot be told from another order of the same sum.
_UNSEEN = 2.0**-24


class FormatUnavailable(Exception):
    """The device cannot hold weights in a format; says why and what to choose instead."""


@dataclass(frozen=True, slots=True)
class LinearImpl:
    """One way of holding a linear layer: weight [N, K] and bias [N] or None -> a module."""

    name: str
    build: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear]


def check(chosen: WeightFormat, device: torch.device) -> None:
    """Raises FormatUnavailable when no layer at all can be held so on this device."""
    if chosen in LOSSLESS:
        return
    if chosen == "fp8":
        if device.type != "cuda":
            raise FormatUnavailable(
                "weights fp8 need a GPU with fp8 arithmetic (compute capability 8.9 or newer), "
                f"this device is {device.type}; w8a8 is the eight-bit format of a CPU"
            )
        if torch.cuda.get_device_capability(device) < (8, 9):
            raise FormatUnavailable(
                "weights fp8 need compute capability 8.9 or newer, this GPU has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; use bf16"
            )
    elif device.type != "cpu":
        raise FormatUnavailable(
            f"weights {chosen} are computed by the CPU's kernels, this device is {device.type}; "
            "use fp8 or bf16"
        )
    elif chosen == "w8a8" and not engines():
        raise FormatUnavailable(
            "weights w8a8 need torch built with FBGEMM or oneDNN, this one has neither; use w8"
        )


def ways(
    chosen: WeightFormat,
    weight: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    library: ctypes.CDLL | None = None,
) -> list[LinearImpl]:
    """The ways of holding this weight in this format, the one to prefer first; [] if there is none.

    `dtype` is that of the activations. Each takes the weight as the checkpoint has it. `library`
    is compiled code for some ways more.
    """
    if device.type != "cpu":
        return [LinearImpl("fp8", _fp8)] if chosen == "fp8" else [_plain(chosen, dtype)]
    features_in = weight.shape[1]
    found: list[LinearImpl] = []
    if library is not None and takes(library, features_in):
        found += _native_ways(library, chosen, weight, dtype)
    if chosen in LOSSLESS:
        return found + _float_ways(chosen, weight, dtype)
    if chosen in ("w8a8", "w8"):
        for engine in engines():
            # Beyond the last whole group of four oneDNN pairs other bytes than it does before.
            if engine == "fbgemm" or features_in % 4 == 0:
                build = partial(_int8, engine=engine, wide=chosen == "w8")
                found.append(LinearImpl(f"{chosen}-{engine}", build))
        if chosen == "w8" and features_in % _BYTE_FEATURES == 0:
            found.append(LinearImpl("w8-torch", _byte))
    elif chosen == "int4" and features_in % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        found.append(LinearImpl("int4-torch", _int4))
    return found


def hold(
    chosen: WeightFormat,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefer: Sequence[str] = (),
    piece_rows: int = PIECE_ROWS,
    forget: Callable[[], None] = lambda: None,
    library: ctypes.CDLL | None = None,
    choices: Choices | None = None,
) -> tuple[PackedLinear, str] | None:
    """The layer, in pieces if it has very many rows, and the way in which its first is held.

    None when this weight cannot be held so. `forget` is called when a piece has been read.
    """
    pieces = []
    names = []
    for rows in runs(weight.shape[0], piece_rows):
        impl = choose(
            chosen, weight[rows], dtype, device, prefer=prefer, library=library, choices=choices
        )
        if impl is None:
            return None
        pieces.append(impl.build(weight[rows], None if bias is None else bias[rows]))
        pieces[-1].way = impl.name
        names.append(impl.name)
        forget()
    return (pieces[0] if len(pieces) == 1 else PieceLinear(pieces)), names[0]


def multiply_stored(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    forget: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """x W^T + b in the dtype and place of x, wherever the weight lies, without a whole copy."""
    outputs = []
    for rows in runs(weight.shape[0], PIECE_ROWS):
        addend = None if bias is None else bias[rows].to(x)
        outputs.append(torch.nn.functional.linear(x, weight[rows].to(x), addend))
        forget()
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def choose(
    chosen: WeightFormat,
    weight: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefer: Sequence[str] = (),
    library: ctypes.CDLL | None = None,
    choices: Choices | None = None,
) -> LinearImpl | None:
    """One of `prefer`, else the fastest of the ways here; None when this weight has none.

    What is fastest stands in `choices`; without any, it is measured once in a process.
    """
    found = ways(chosen, weight, dtype, device, library)
    found = [one for one in found if one.name in prefer] or found
    if len(found) < 2:
        return found[0] if found else None
    by_us = found[0].name.endswith(_NATIVE)
    if library is not None and by_us and is_fastest(library, weight.numel()):
        return found[0]
    rows, features_in = min(weight.shape[0], _SAMPLE_ROWS), weight.shape[1]
    by_name = {one.name: one for one in found}
    threads = torch.get_num_threads()
    names = tuple(by_name)
    measure = partial(_fastest, chosen, names, rows, features_in, dtype, library, threads)
    if choices is None:
        return by_name[measure()]
    question = f"{chosen} {rows}x{features_in} {_named(dtype)} {_here()}"
    return by_name[choices.make(question, names, measure)]


# ---- formats: weight [N, K], bias [N] -> a module ------------------------------------------------


def _float_ways(chosen: WeightFormat, weight: torch.Tensor, dtype: torch.dtype) -> list[LinearImpl]:
    """Ways that keep the values of fp32, or of bf16 where that is what was asked for.

    A bias keeps the dtype of the activations: it is too small to save anything.
    """
    narrow = _is_narrow(chosen, dtype)
    kept = torch.bfloat16 if narrow else torch.float32
    found = []
    if narrow and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.append(_kept("bf16-mkldnn", MkldnnLinear, kept, dtype))
    if chosen != "fp32" and "fbgemm" in engines():
        exponent = half_exponent(weight.to(kept))
        if exponent is not None:
            half = partial(HalfLinear, exponent=exponent)
            found.append(_kept("fp16-fbgemm", half, kept, torch.float32))
    if dtype == torch.float32 or chosen == "fp32":
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            found.append(_kept("fp32-mkldnn", MkldnnLinear, kept, torch.float32))
        if dtype == torch.float32:
            found.append(_kept("fp32", PlainLinear, kept, torch.float32))
    else:
        found.append(_plain(chosen, dtype))
    return found


def _is_narrow(chosen: WeightFormat, dtype: torch.dtype) -> bool:
    """Whether the values of weights are those of bf16."""
    return chosen == "bf16" or (chosen == "auto" and dtype == torch.bfloat16)


def _native_ways(
    library: ctypes.CDLL, chosen: WeightFormat, weight: torch.Tensor, dtype: torch.dtype
) -> list[LinearImpl]:
    """Our own compiled products. A bias keeps the dtype of the activations."""
    found = []
    if chosen == "w8a8":
        found.append(LinearImpl(f"w8a8{_NATIVE}", partial(_native_int8, library)))
    elif chosen in LOSSLESS:
        narrow = _is_narrow(chosen, dtype)
        if narrow or (chosen == "auto" and _is_bf16(weight)):
            build = partial(_native_float, library, torch.bfloat16, dtype)
            found.append(LinearImpl(f"bf16{_NATIVE}", build))
        if not narrow:
            build = partial(_native_float, library, torch.float32, dtype)
            found.append(LinearImpl(f"fp32{_NATIVE}", build))
    return found


def _is_bf16(weight: torch.Tensor) -> bool:
    """Whether bf16 has all of these values."""
    parts = small_runs(weight)
    return all(
        torch.equal(weight[rows].bfloat16().to(weight.dtype), weight[rows]) for rows in parts
    )


def _native_float(
    library: ctypes.CDLL,
    kept: torch.dtype,
    dtype: torch.dtype,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> PackedLinear:
    return NativeLinear(library, weight.to(kept), None if bias is None else bias.to(dtype))


def _native_int8(
    library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None
) -> PackedLinear:
    integers, scales = to_int8(weight, paired=not adds_bytes_exactly(library))
    return NativeLinear(library, integers, bias, scales)


def _plain(chosen: WeightFormat, dtype: torch.dtype) -> LinearImpl:
    kept = torch.bfloat16 if chosen == "bf16" else dtype
    return _kept(_named(dtype), PlainLinear, kept, dtype)


def _kept(
    name: str,
    kind: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear],
    kept: torch.dtype,
    held: torch.dtype,
) -> LinearImpl:
    """Weights with the values that `kept` gives them, handed to `kind` in the dtype `held`."""

    def build(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        return kind(weight.to(kept).to(held), None if bias is None else bias.to(held))

    return LinearImpl(name, build)


def half_exponent(weight: torch.Tensor) -> int | None:
    """The power of two with which fp16 holds a weight as well as fp32 would; None if there is none.

    "As well" is a loss below the rounding of one fp32 sum in every row. Weights of bf16 lose
    nothing down to 2^-32 of the largest one.
    """
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        return None
    top = 0 if largest == 0 else 15 - math.frexp(largest)[1]
    for exponent in (0, top):
        if all(_fits_half(weight[rows], exponent) for rows in small_runs(weight)):
            return exponent
    return None


def _fits_half(weight: torch.Tensor, exponent: int) -> bool:
    moved = weight.float() * 2.0**exponent
    lost = moved.to(torch.float16).float().sub_(moved).norm(dim=1)
    return bool((lost <= moved.norm(dim=1) * _UNSEEN).all())


def _int8(
    weight: torch.Tensor, bias: torch.Tensor | None, *, engine: Engine, wide: bool
) -> PackedLinear:
    integers, scales = to_int8(weight, paired=not multiplies_exactly(engine))
    return Int8Linear(integers, scales, bias, engine=engine, wide=wide)


def _byte(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    return ByteLinear(*to_int8(weight, paired=False), bias)


def _int4(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    return Int4Linear(*to_int4(weight), bias, INT4_GROUP)


def to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers 0..15 [N, K] and, for each group of INT4_GROUP, (scale, zero) [K / G, N, 2].

    A value is (integer - 8) * scale + zero; both are rounded to bf16 first, as the kernel has them.
    """
    grouped = weight.float().reshape(weight.shape[0], -1, INT4_GROUP)
    low, high = torch.aminmax(grouped, dim=-1)
    scales = ((high - low) / 15).bfloat16().float().clamp_(min=1e-30)
    zeros = (low + 8 * scales).bfloat16().float()
    integers = ((grouped - zeros[..., None]) / scales[..., None]).round_().add_(8).clamp_(0, 15)
    pairs = torch.stack([scales.t(), zeros.t()], dim=-1)
    return integers.view_as(weight).to(torch.int32), pairs.contiguous()


def _fp8(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    largest = torch.finfo(torch.float8_e4m3fn).max
    whole = weight.float()
    scales = (whole.abs().amax(1) / largest).clamp_(min=1e-12)
    floats = (whole / scales[:, None]).clamp_(-largest, largest).to(torch.float8_e4m3fn)
    return Fp8Linear(floats, scales, bias)


# ---- this machine --------------------------------------------------------------------------------


def computes_bf16_faster(choices: Choices | None = None) -> bool:
    """Whether activations in bf16 are faster than in fp32 on this CPU: native arithmetic for it."""
    if choices is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _multiplies_bf16_faster()

    def measure() -> str:
        return "bfloat16" if _multiplies_bf16_faster() else "float32"

    return choices.make(f"activations {_here()}", ("float32", "bfloat16"), measure) == "bfloat16"


def _here() -> str:
    """What a measurement holds for, besides the kind of machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} threads={torch.get_num_threads()}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _multiplies_bf16_faster() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    layers = [MkldnnLinear(weight, None), MkldnnLinear(weight.bfloat16(), None)]
    return fastest(layers, [torch.float32, torch.bfloat16]) == 1


@cache
def _fastest(
    chosen: WeightFormat,
    names: tuple[str, ...],
    rows: int,
    features_in: int,
    dtype: torch.dtype,
    library: ctypes.CDLL | None,
    threads: int,  # noqa: ARG001 - part of the key: a choice holds for one number of threads
) -> str:
    """The fastest of these ways for weights that all of them can hold."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, features_in, generator=generator).mul_(0.02).bfloat16()
    known = {one.name: one for one in ways(chosen, weight, dtype, torch.device("cpu"), library)}
    layers = [known[name].build(weight, None) for name in names]
    clearly = {"clearly": _CLEARLY_FASTER} if names[0].endswith(_NATIVE) else {}
    return names[fastest(layers, [dtype] * len(layers), **clearly)]
