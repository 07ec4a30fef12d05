"""The untouched model's forward pass over the proof's prompts, with surgery right behind it.

Knows modules and where their weights lie; knows no configuration. Weights stay in their files until
a layer is about to run. Each layer then runs untouched, is operated on, runs again on the same
input, and is put back if it gives something else. So the logits are those of the untouched model,
and yet no more than one untouched layer is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.quantize import LOSSLESS, multiply_stored
from runtime.shards import Shards
from runtime.surgery import Plan, Tally, apart, convert, weight_told
from runtime.table import FileTable, StoredTable

# A tied table that is larger stays in its file: its other copy is the output layer.
_FILE_TABLE_BYTES = 64 * 2**20
# How far an operated layer may be from the untouched one (relative, Frobenius) on real activations,
# the residual stream included. Rounding is judged by single layers and by the proof; here it is
# only told from layers that are wired wrongly.
_LOSSLESS_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
_ROUNDED_LIMIT = 0.5


class StoredLinear(nn.Module):
    """An untouched output layer whose weights are still in their file."""

    def __init__(self, layer: nn.Linear, plan: Plan) -> None:
        super().__init__()
        self.layer = layer
        self._forget = plan.forget
        self.weight = weight_told(layer.weight, plan.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_stored(x, self.layer.weight, self.layer.bias, self._forget)


@torch.inference_mode()
def run_and_convert(
    module: PreTrainedModel,
    plan: Plan,
    shards: Shards | None,
    forward: Callable[[], list[torch.Tensor]],
) -> tuple[list[torch.Tensor], Tally]:
    """What `forward` gives on the untouched model, and what was done to it meanwhile.

    `forward` calls the module on the device of the plan. Without `shards` the weights are in memory
    already.
    """
    layers = layers_of(module)
    head = _head_of(module)
    total = Tally(parameters=sum(weight.numel() for weight in module.parameters()))
    tables = _hold_tables(module, plan, shards, head)
    _bring(module, plan, shards, besides=[*layers, *tables, *([head] if head else [])])
    done: list[nn.Module] = []

    def before(layer: nn.Module, _: Any) -> None:
        _bring(layer, plan, shards)

    def after(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if layer not in done:  # a layer that runs twice is operated on once
            _operate(layer, plan, total, lambda: layer.forward(*args, **kwargs), output)
            done.append(layer)
            plan.forget()

    with _standing_in(module, head, plan), _hooked(layers, before, after):
        logits = forward()
    for layer in layers:
        if layer not in done:  # it takes no part in a forward pass, so nothing can go wrong in it
            _bring(layer, plan, shards)
    total.keep(convert(module, plan, head=head, finished=done))
    if head is not None and head is _head_of(module):  # no format takes it
        _bring(head, plan, shards)
    plan.forget()
    return logits, total


def _head_of(module: PreTrainedModel) -> nn.Linear | None:
    """The output layer, where it is a plain linear one."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # no hints there
    return head if type(head) is nn.Linear else None


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The model's layers: the members of its outermost list of as many modules as it has layers.

    A model without such a list is one layer.
    """
    config: Any = module.config
    count = config.get_text_config().num_hidden_layers
    for one in module.modules():
        if isinstance(one, nn.ModuleList) and len(one) == count and count > 0:
            return list(one)
    return []


def _operate(
    layer: nn.Module, plan: Plan, total: Tally, again: Callable[[], Any], untouched: Any
) -> None:
    """Converts one layer and keeps what was done only if it still gives what it gave."""
    tally = convert(layer, plan)
    chosen = {plan.weights.attention, plan.weights.mlp}
    limit = _LOSSLESS_LIMITS[plan.dtype] if chosen <= set(LOSSLESS) else _ROUNDED_LIMIT
    if plan.rounded:
        limit = _ROUNDED_LIMIT
    elif "bf16" in chosen:
        limit = max(limit, _LOSSLESS_LIMITS[torch.bfloat16])
    try:
        far = apart(_first(again()), _first(untouched).float())
    except Exception:  # noqa: BLE001 - a class may use its linear layers in ways of its own
        far = float("inf")
    if far <= limit:
        total.keep(tally)
        return
    tally.undo()
    total.untouched.append(type(layer).__name__)


def _first(output: Any) -> torch.Tensor:
    """The hidden states of a layer's output."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _hold_tables(
    module: PreTrainedModel, plan: Plan, shards: Shards | None, head: nn.Linear | None
) -> list[nn.Module]:
    """Plain embeddings keep the dtype of their file; gives the modules that hold them.

    The large table of a model whose output layer is tied to it stays in the file altogether.
    """
    tables: list[nn.Module] = []
    if shards is None:
        return tables
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Embedding or child.max_norm is not None:
                continue
            weight = child.weight
            place = shards.place_of(weight)
            tied = head is not None and weight.data_ptr() == head.weight.data_ptr()
            if place and tied and weight.nbytes > _FILE_TABLE_BYTES and plan.device.type == "cpu":
                table: nn.Module = FileTable(place.file, place.offset, weight, plan.dtype)
            else:
                table = StoredTable(weight.to(plan.device, copy=True), plan.dtype)
            setattr(parent, name, table)
            tables.append(table)
    return tables


def _bring(
    root: nn.Module,
    plan: Plan,
    shards: Shards | None,
    besides: list[nn.Module] | None = None,
) -> None:
    """Brings parameters and buffers into memory, onto the device, and into the plan's dtype."""
    if shards is None:
        return
    left_out = {id(one) for module in besides or [] for one in module.modules()}
    strict = getattr(root, "_keep_in_fp32_modules_strict", None) or ()
    for path, module in root.named_modules():
        if id(module) in left_out:
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            kept = torch.float32 if any(part in f"{path}.{name}" for part in strict) else plan.dtype
            dtype = kept if weight.is_floating_point() else weight.dtype
            own = weight.to(plan.device, dtype, copy=shards.place_of(weight) is not None)
            setattr(module, name, nn.Parameter(own, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            own = buffer.to(plan.device, copy=shards.place_of(buffer) is not None)
            setattr(module, name, own)


@contextmanager
def _standing_in(module: PreTrainedModel, head: nn.Linear | None, plan: Plan) -> Iterator[None]:
    """While weights lie in files, the output layer computes from there."""
    if head is None:
        yield
        return
    parent, name = _place_of(module, head)
    setattr(parent, name, StoredLinear(head, plan))
    try:
        yield
    finally:
        setattr(parent, name, head)


def _place_of(module: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    for parent in module.modules():
        for name, one in parent.named_children():
            if one is child:
                return parent, name
    raise LookupError("the output layer is no part of the model")


@contextmanager
def _hooked(layers: list[nn.Module], before: Any, after: Any) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
