"""Whether a model's logits through our attention are its own: the condition for serving it.

Knows what a model class must do with attention; knows no files. A model passes when each layer
calls the interface exactly once, and when the logits of packed, paged, chunked prompts equal those
of transformers' own attention; where layers round, each attention is compared by itself as well
(`runtime.own_attention`). It compares the model with itself, so it says nothing about the weights,
nor about positions beyond its longest prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from runtime import attention
from runtime.attention import Span, lay_out, paged_attention
from runtime.attention_calls import (
    CHECK_CONFIG,
    OTHER_FAMILY,
    observe_layers,
    refuse_odd_windows,
)
from runtime.kv import blocks_for
from runtime.model import LayerShape, Model, ModelRefused
from runtime.own_attention import OwnAttention

# The proof's prompts: one that spans two blocks and is cut in chunks, a short one, one of a token.
_PROOF_LENGTHS = (23, 7, 1)
_PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# The same where layers round, and each of them meets what it met before.
_ROUNDED_TOLERANCE = 0.1
# Of what a layer attends to, from the same input: no rounding of layers comes between. Measured
# over the families of the tests: at most 4e-7 in fp32 and 0.014 in bf16; a scale that is off by a
# tenth 0.06, a window that is one token short 0.02, scores of Gemma 2 without their cap 0.007.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
_OTHER_WEIGHTS = "take a format that rounds less, such as w8a8 or bf16, or auto"


def reason_of(error: BaseException) -> str:
    """An error as one line: its type, and the first of its lines that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and "above report" not in line]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"


@contextlib.contextmanager
def refusing(where: Path | str, what: str, advice: str) -> Iterator[None]:
    """Whatever others' code raises inside becomes a ModelRefused: where, what, why, what to do."""
    try:
        yield
    except ModelRefused:
        raise
    except Exception as error:  # model classes and file readers of others raise any type
        raise ModelRefused(f"{where}: {what} ({reason_of(error)}); {advice}") from error


@dataclass(frozen=True, slots=True)
class Reference:
    """What a module gave before it was changed, and what it computes in.

    Where its weights were rounded, `rounding` is how far that may move the logits (relative, the
    middle one of the prompts), and paged attention is compared without that part.
    """

    logits: list[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    rounding: float | None = None


@torch.inference_mode()
def prove(
    module: PreTrainedModel, folder: Path, reference: Reference | None = None
) -> list[LayerShape]:
    """The model's attention layers in order, once their paged logits equal transformers' own.

    Without a reference the module is compared with itself. Raises ModelRefused naming the first
    thing that does not hold.
    """
    name = type(module).__name__
    device = module.device if reference is None else reference.device
    config = module.config.get_text_config()
    prompts = proof_prompts(config.vocab_size, device)
    if reference is None:
        reference = Reference(own_logits(module, prompts, folder), module.dtype, device)
    with refusing(folder, f"{name} does not take paged attention", OTHER_FAMILY):
        module.set_attn_implementation(attention.NAME)
        layers = observe_layers(module, prompts[1], folder)
        refuse_odd_windows(config, layers, folder)
        _refuse_no_context(config, folder)
    expected, limit, own = reference.logits, _PROOF_TOLERANCE[reference.dtype], None
    if reference.rounding is not None:
        with refusing(folder, f"{name} fails with runtime.weights", _OTHER_WEIGHTS):
            own, rounded = _record_own(module, layers, prompts, folder)
        _refuse_rounding(expected, rounded, reference.rounding, folder)
        expected, limit = rounded, max(limit, _ROUNDED_TOLERANCE)
    with refusing(folder, f"{name} does not take paged attention", OTHER_FAMILY):
        blocks = sum(blocks_for(length) for length in _PROOF_LENGTHS)
        model = Model(module, layers, blocks, dtype=reference.dtype, device=device)
        found = _paged_logits(model, prompts, own)
    if own is not None:
        _refuse_odd_attention(own, _ATTENTION_TOLERANCE[reference.dtype], name, folder)
    for one, other in zip(expected, found, strict=True):
        apart = ((one - other.float()).abs().max() / one.abs().max().clamp(min=1.0)).item()
        if not apart <= limit:
            raise ModelRefused(
                f"{folder}: {name} gives other logits through paged attention "
                f"than through its own (relative difference {apart:.2g}, limit {limit:.2g}); its "
                f"attention has a term that the attention interface does not carry; {OTHER_FAMILY}"
            )
    return layers


def own_logits(
    module: PreTrainedModel, prompts: list[torch.Tensor], folder: Path
) -> list[torch.Tensor]:
    """Each prompt's last logits by transformers' attention, [V] fp32: one forward over all.

    Shorter prompts are filled up behind their end, which no token before it sees.
    """
    rows = pad_sequence([prompt[0] for prompt in prompts], batch_first=True)
    with refusing(folder, f"{type(module).__name__}'s own forward pass fails", CHECK_CONFIG):
        ends = torch.tensor([prompt.shape[1] - 1 for prompt in prompts], device=rows.device)
        # [prompts, ends, V]: a large vocabulary makes all positions' logits the largest tensor.
        logits = module(input_ids=rows, use_cache=False, logits_to_keep=ends).logits
        return [logits[number, number].float().clone() for number in range(len(prompts))]


def _record_own(
    module: PreTrainedModel, layers: list[LayerShape], prompts: list[torch.Tensor], folder: Path
) -> tuple[OwnAttention, list[torch.Tensor]]:
    """What each layer of the module, as it is now, attends to by itself, and its logits."""
    module.set_attn_implementation("eager")
    own = OwnAttention(_PROOF_LENGTHS)
    with own.recording([layer.module for layer in layers]):
        logits = own_logits(module, prompts, folder)
    module.set_attn_implementation(attention.NAME)
    return own, logits


def _refuse_odd_attention(own: OwnAttention, limit: float, name: str, folder: Path) -> None:
    for number, record in enumerate(own.records.values()):
        if not record.apart <= limit:
            raise ModelRefused(
                f"{folder}: layer {number} of {name} attends otherwise through paged attention "
                f"than through its own (relative difference {record.apart:.2g}, limit {limit:.2g});"
                f" its attention has a term that the attention interface does not carry; "
                f"{OTHER_FAMILY}"
            )


def _refuse_rounding(
    expected: list[torch.Tensor], rounded: list[torch.Tensor], limit: float, folder: Path
) -> None:
    """One prompt may lie far off: in a mixture of experts rounding can choose another expert."""
    apart = median(
        ((one - other).norm() / one.norm()).item()
        for one, other in zip(expected, rounded, strict=True)
    )
    if not apart <= limit:
        raise ModelRefused(
            f"{folder}: runtime.weights move the logits too far (relative difference {apart:.2g}, "
            f"limit {limit:.2g}); {_OTHER_WEIGHTS}"
        )


def proof_prompts(vocab_size: int, device: torch.device) -> list[torch.Tensor]:
    """The proof's prompts, [1, T] each, the same at every start."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, vocab_size, (1, length), generator=generator).to(device)
        for length in _PROOF_LENGTHS
    ]


def _refuse_no_context(config: Any, folder: Path) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ModelRefused(
            f"{folder}: config.json gives max_position_embeddings {limit!r}; write the number of "
            "tokens that fit into the context there"
        )


def _paged_logits(
    model: Model, prompts: list[torch.Tensor], own: OwnAttention | None
) -> list[torch.Tensor]:
    """Each prompt's last logits, packed together; the first one in two chunks and a decode.

    With `own`, each layer's attention is compared with what was recorded, and then replaced by it.
    """
    tables: list[list[int]] = []
    for prompt in prompts:
        first = sum(len(table) for table in tables)
        tables.append(list(range(first, first + blocks_for(prompt.shape[1]))))
    long = prompts[0][0].tolist()
    cut = len(long) // 2

    def run(parts: list[tuple[int, list[int], int]]) -> torch.Tensor:
        """parts: (prompt number, ids, position of the first) in packing order."""
        spans = [Span(at + len(ids), len(ids), tables[number]) for number, ids, at in parts]
        layout = lay_out(spans, model.device)
        ids = [token for _, part, _ in parts for token in part]
        positions = [at + i for _, part, at in parts for i in range(len(part))]
        keep = [
            start + len(part) - 1 for start, (_, part, _) in zip(layout.starts, parts, strict=True)
        ]
        if own is None:
            return model.forward(ids, positions, layout, keep)
        own.step([(number, at, len(ids)) for number, ids, at in parts])
        with own.compared(attention.NAME, paged_attention):
            return model.forward(ids, positions, layout, keep)

    run([(0, long[:cut], 0)])
    mixed = run(
        [
            (2, prompts[2][0].tolist(), 0),
            (0, long[cut:-1], cut),
            (1, prompts[1][0].tolist(), 0),
        ]
    )
    last = run([(0, long[-1:], len(long) - 1)])
    return [last[0], mixed[2], mixed[0]]
