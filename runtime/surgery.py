"""Replaces linear layers and norms of a model class by faster ones that give the same.

Knows the names under which transformers' families keep siblings, and checks each replacement
against the untouched module; whatever differs, or looks otherwise, is left alone. Knows no files.
Layers that read the same input are fused into one, and their outputs are slices of its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from ctypes import CDLL
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from policies.schema import WeightFormat, Weights
from runtime import quantize
from runtime.choices import Choices
from runtime.linear import PackedLinear

# Siblings that are called with the same tensor, in the order in which they stand in the output.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)
_ROUTERS = ("gate", "router")  # beside `experts`: a rounded choice of experts is another model
_EPSILONS = ("variance_epsilon", "eps")

# Largest relative difference (Frobenius) of a layer's output from the untouched one's on standard
# normal inputs. Measured on layers of pocket and of random weights: fp32 < 1e-6, bf16 0.2 %,
# w8a8 0.4-1.1 %, w8 0.3-0.9 %, int4 2-6 %.
_LIMITS: dict[WeightFormat, float] = {"w8a8": 0.03, "w8": 0.03, "int4": 0.15, "fp8": 0.08}
_LOSSLESS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.003}
_PARITY_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted: the formats of each part, and the dtype of activations.

    Ways of holding named in `prefer` are taken without measuring, where a format has them.
    `forget` is called when weights that were read are not needed in memory any more. `rounded`
    says that the checkpoint itself rounds, perhaps activations too. `library` is compiled code,
    `choices` what was measured before.
    """

    weights: Weights
    dtype: torch.dtype
    device: torch.device
    prefer: tuple[str, ...] = ()
    forget: Callable[[], None] = lambda: None
    rounded: bool = False
    library: CDLL | None = None
    choices: Choices | None = None


@dataclass(slots=True)
class Tally:
    """What was done: how many layers each way holds, what is fused, and what was left alone.

    `shapes` counts the same by a layer's outputs and inputs, each piece of it by itself.
    """

    parameters: int = 0
    held: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    held_bytes: int = 0
    fused: int = 0
    norms: int = 0
    untouched: list[str] = field(default_factory=list)
    swapped: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    @property
    def rounds(self) -> bool:
        """Whether any layer is held in a format that loses something against its weights."""
        return any(way.partition("-")[0] in quantize.ROUNDED for way in self.held)

    def keep(self, other: Tally) -> None:
        """Counts what the other one did. The modules that it replaced are let go."""
        self.held += other.held
        self.shapes += other.shapes
        self.held_bytes += other.held_bytes
        self.fused += other.fused
        self.norms += other.norms
        self.untouched += other.untouched

    def undo(self) -> None:
        """Puts the replaced modules back."""
        for parent, name, module in self.swapped:
            setattr(parent, name, module)

    def swap(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        self.swapped.append((parent, name, parent.get_submodule(name)))
        setattr(parent, name, new)


class Fused:
    """A fused layer and its last output, from which its slices are taken.

    Model classes hand the same tensor to one sibling after the other. A sibling that gets another
    one, or is called twice, multiplies again: slower, never wrong.
    """

    __slots__ = ("_input", "_output", "_waiting", "linear")

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._waiting: set[str] = set()

    def output(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if x is not self._input or name not in self._waiting:
            self._input, self._output = x, self.linear(x)
            self._waiting = set(self.linear.slices)
        y = self._output
        assert y is not None
        self._waiting.discard(name)
        if not self._waiting:
            self._input = self._output = None
        return y


class FusedSlice(nn.Module):
    """Stands where one of the fused layers stood. The layer itself is `fused.linear`."""

    def __init__(self, fused: Fused, name: str) -> None:
        super().__init__()
        self.fused = fused
        self.name = name
        rows = fused.linear.slices[name]
        self._start, self._count = rows.start, rows.stop - rows.start
        self.in_features = fused.linear.in_features
        self.out_features = self._count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.output(x, self.name).narrow(-1, self._start, self._count)


class FusedNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w in four kernels instead of seven, sums in fp32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        size = weight.shape[-1]
        self.eps = eps
        self.register_buffer("weight", weight.float() * size**0.5, persistent=False)
        self.register_buffer("floor", torch.tensor((eps * size) ** 0.5), persistent=False)
        self.weight: torch.Tensor
        self.floor: torch.Tensor
        self.to(weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return (x * self.weight).div_(torch.hypot(length, self.floor)).to(x.dtype)


@torch.inference_mode()
def convert(
    root: nn.Module,
    plan: Plan,
    *,
    head: nn.Module | None = None,
    finished: Collection[nn.Module] = (),
) -> Tally:
    """Replaces what can be replaced inside `root`, in place; what lies in `finished` stays.

    `head` is the model's output layer.
    """
    tally = Tally()
    done = {id(module) for one in finished for module in one.modules()}
    for name, parent in list(root.named_modules()):
        if id(parent) in done or isinstance(parent, PackedLinear | FusedSlice | FusedNorm):
            continue
        attends = _attends(root, name)
        for siblings in _FUSED:
            _fuse(parent, siblings, plan, tally, attends)
        for child_name, child in list(parent.named_children()):
            where = f"{name}.{child_name}" if name else child_name
            if _is_norm(child):
                _replace_norm(parent, child_name, plan, tally)
            elif _is_linear(child):
                chosen = plan.weights.mlp
                if child is head:
                    chosen = plan.weights.head
                elif attends or "attention" in type(child).__name__.lower():
                    chosen = plan.weights.attention
                if child_name in _ROUTERS and hasattr(parent, "experts"):
                    chosen = "auto"
                _replace_linear(parent, child_name, chosen, plan, tally, where)
    return tally


def _attends(root: nn.Module, name: str) -> bool:
    """Whether a module is, or lies in, one whose class is an attention."""
    parts = name.split(".") if name else []
    paths = [".".join(parts[:count]) for count in range(len(parts) + 1)]
    return any("attention" in type(root.get_submodule(path)).__name__.lower() for path in paths)


# ---- linear layers -------------------------------------------------------------------------------


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) and isinstance(module.weight, torch.Tensor)


def _weight_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight [N, K], bias [N] or None. GPT-2's Conv1D keeps its weight the other way round, a
    quantizer's tensor class gives plain values when asked."""
    weight: Any = layer.weight
    bias = layer.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    if not _is_plain(weight):
        weight = weight.dequantize()
    return (weight.t() if isinstance(layer, Conv1D) else weight), bias


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter)


def _stays(layers: Sequence[nn.Module], chosen: WeightFormat) -> bool:
    """What a quantizer holds in a tensor class of its own stays so under auto."""
    weights = [layer.weight for layer in layers]
    return chosen == "auto" and not all(
        _is_plain(weight) for weight in weights if isinstance(weight, torch.Tensor)
    )


def _replace_linear(
    parent: nn.Module, name: str, chosen: WeightFormat, plan: Plan, tally: Tally, where: str
) -> None:
    layer = parent.get_submodule(name)
    if _stays([layer], chosen):
        tally.held[type(layer.weight).__name__] += 1
        return
    new = _packed([layer], chosen, plan)
    if new is None:
        tally.untouched.append(where)
        return
    linear, way = new
    tally.swap(parent, name, linear)
    _count(tally, linear, way)


def _fuse(parent: nn.Module, names: Sequence[str], plan: Plan, tally: Tally, attends: bool) -> None:
    children = dict(parent.named_children())
    layers = [children.get(name) for name in names]
    found = [layer for layer in layers if layer is not None and _is_linear(layer)]
    if len(found) < len(names) or len({id(layer) for layer in found}) < len(found):
        return
    chosen = plan.weights.attention if attends else plan.weights.mlp
    if _stays(found, chosen):
        return
    weights = [_weight_of(layer) for layer in found]
    if len({weight.shape[1] for weight, _ in weights}) > 1:
        return
    if len({bias is None for _, bias in weights}) > 1:
        return
    new = _packed(found, chosen, plan)
    if new is None:
        return
    linear, way = new
    at = 0
    for name, (weight, _) in zip(names, weights, strict=True):
        linear.slices[name] = slice(at, at + weight.shape[0])
        at += weight.shape[0]
    fused = Fused(linear)
    for name in names:
        tally.swap(parent, name, FusedSlice(fused, name))
    tally.fused += 1
    _count(tally, linear, way)


def _count(tally: Tally, linear: PackedLinear, way: str) -> None:
    tally.held[way] += 1
    tally.shapes.update((one.out_features, one.in_features, one.way) for one in linear.parts)
    tally.held_bytes += linear.held_bytes


def _packed(
    layers: Sequence[nn.Module], chosen: WeightFormat, plan: Plan
) -> tuple[PackedLinear, str] | None:
    """One layer for all of these, which gives what they give, and how it is held.

    A weight that this format does not take, or that it spoils, is held without loss.
    """
    weights = [_weight_of(layer) for layer in layers]
    weight = torch.cat([one for one, _ in weights]) if len(weights) > 1 else weights[0][0]
    biases = [one for _, one in weights if one is not None]
    bias = torch.cat(biases) if biases else None
    x = _normal(weight.shape[1], plan)
    expected = quantize.multiply_stored(x, weight, bias, plan.forget)
    formats: list[WeightFormat] = [chosen] if chosen in quantize.LOSSLESS else [chosen, "auto"]
    for one in formats:
        held = quantize.hold(
            one,
            weight,
            bias,
            plan.dtype,
            plan.device,
            prefer=plan.prefer,
            forget=plan.forget,
            library=plan.library,
            choices=plan.choices,
        )
        if held is None:
            continue
        limit = _LIMITS.get(one, _LOSSLESS_LIMITS[plan.dtype])
        if one == "bf16" or (plan.dtype == torch.bfloat16 and one in quantize.LOSSLESS):
            limit = _LOSSLESS_LIMITS[torch.bfloat16]
        if apart(held[0](x), expected.float()) <= limit:
            if not hasattr(held[0], "weight"):
                held[0].weight = weight_told(weight, plan.dtype)
            return held
    return None


def weight_told(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Shape and dtype of a weight for classes that ask for them; whoever computes with it fails."""
    return torch.empty(weight.shape, dtype=dtype, device="meta")


# ---- norms ---------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and len(list(module.parameters())) == 1
    )


def _replace_norm(parent: nn.Module, name: str, plan: Plan, tally: Tally) -> None:
    """Some families scale by w, some by 1 + w: the one that gives the same, or neither."""
    norm = parent.get_submodule(name)
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    eps = next((getattr(norm, one) for one in _EPSILONS if hasattr(norm, one)), None)
    if not isinstance(eps, float):
        return
    x = _normal(weight.shape[0], plan)
    x[:, 0] *= 1e-3  # so small that eps matters
    expected = norm(x)
    for scale in (weight, 1 + weight.float()):
        new = FusedNorm(scale, eps)
        if apart(new(x), expected.float()) <= _LOSSLESS_LIMITS[plan.dtype]:
            tally.swap(parent, name, new)
            tally.norms += 1
            return


def _normal(size: int, plan: Plan) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PARITY_TOKENS, size, generator=generator)
    return x.to(plan.device, plan.dtype)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    apart = (found.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(apart) if torch.isfinite(apart) else float("inf")
