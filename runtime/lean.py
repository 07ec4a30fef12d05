"""A draft of Llama's kind in a few torch operators a layer, without its class around them.

A draft's pass computes little, and transformers' modules take five times as long as that to call it
(docs/log.md, 2026-11-26). Knows which modules such a model consists of, as `runtime.compiled` does,
which is faster still where there is a compiler; knows no requests. It is used where it gives the
logits that the module itself gives.

Legend: T tokens, H heads, KV key-value heads, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from runtime.attention import paged_attention
from runtime.compiled import NotOfThisKind, apart, fused_of, inside, norm_of, want, want_room
from runtime.model import Model
from runtime.paged_kernel import PagedKernel
from runtime.step_layout import StepLayout

log = logging.getLogger(__name__)

# Largest relative difference (Frobenius) of the logits from the module's own.
_CLOSE = 1e-3


@dataclass(frozen=True, slots=True)
class _Layer:
    attention: Any
    scale: float
    window: int | None
    before: torch.Tensor  # factors of the norm before attention, and of that before the MLP
    between: torch.Tensor
    qkv: Any
    out: Any
    gate_up: Any
    down: Any


class LeanStep:
    """A whole step in fp32 on the layers' own weights, of any length."""

    def __init__(self, model: Model) -> None:
        """Raises NotOfThisKind."""
        config: Any = model.config
        inner, layers = inside(model.module)
        want(config.hidden_act == "silu", "its activation is not silu")
        want(model.dtype == torch.float32, "its activations are not fp32")
        first, rotary = layers[0].self_attn, inner.rotary_emb
        self._dim = int(first.head_dim)
        want(rotary.inv_freq.numel() == self._dim // 2, "only part of each head is turned")
        self._step = model.step
        self._embed, self._head = inner.embed_tokens, model.module.get_output_embeddings()  # type: ignore[no-untyped-call]  # no hints
        norm, self._eps = norm_of(inner.norm)
        size = norm.numel()
        self._root = size**0.5
        self._norm = norm * self._root
        self._floor = torch.tensor((self._eps * size) ** 0.5, device=model.device)
        self._layers = [self._layer(*pair) for pair in zip(layers, model.windows, strict=True)]
        qkv = self._layers[0].qkv.out_features // self._dim
        self._heads = self._layers[0].out.in_features // self._dim
        self._kv_heads = (qkv - self._heads) // 2
        angles = torch.arange(model.context_tokens)[:, None] * rotary.inv_freq.float().cpu()
        scale = float(rotary.attention_scaling)
        self._cosines = (angles.cos() * scale).to(model.device)
        self._sines = (angles.sin() * scale).to(model.device)

    def _layer(self, layer: Any, window: int | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        want(getattr(attention, "q_norm", None) is None, "its queries are normed")
        norms = [norm_of(one) for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        want(all(eps == self._eps for _, eps in norms), "norms differ in eps")
        return _Layer(
            attention,
            float(attention.scaling),
            window,
            norms[0][0] * self._root,
            norms[1][0] * self._root,
            fused_of(attention, "q_proj", "k_proj", "v_proj"),
            attention.o_proj,
            fused_of(mlp, "gate_proj", "up_proj"),
            mlp.down_proj,
        )

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Activations are never rounded here."""
        yield

    def bind(self, kernels: Many[PagedKernel | None]) -> None:
        """The layers find their pools themselves."""

    def takes(self, layout: StepLayout) -> bool:
        """Whether no adapter is asked for."""
        return not layout.adapters

    def __call__(
        self, ids: Many[int], positions: Many[int], layout: StepLayout, keep: Many[int]
    ) -> torch.Tensor:
        """Logits [len(keep), V]."""
        self._step.layout = layout
        try:
            x = self._embed(torch.tensor(ids, device=self._cosines.device))
            at = torch.tensor(positions, device=x.device)
            cosines, sines = self._cosines[at][:, None], self._sines[at][:, None]  # [T, 1, D / 2]
            for layer in self._layers:
                x = x + layer.out(self._attend(layer, x, cosines, sines))
                gate, up = layer.gate_up(self._normed(x, layer.between)).chunk(2, -1)
                x = x + layer.down(functional.silu(gate).mul_(up))
        finally:
            self._step.layout = None
        if len(keep) < len(x):
            x = x[torch.tensor(keep, device=x.device)]
        logits: torch.Tensor = self._head(self._normed(x, self._norm))
        return logits

    def _normed(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * w in four kernels: torch's own takes five times as long."""
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * factors).div_(torch.hypot(length, self._floor))

    def _attend(
        self, layer: _Layer, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        """x [T, hidden] -> [T, H * D]."""
        tokens, heads, both = len(x), self._heads, self._heads + self._kv_heads
        qkv = layer.qkv(self._normed(x, layer.before)).view(tokens, -1, self._dim)
        first, second = qkv[:, :both].chunk(2, -1)
        turned = torch.cat(
            (
                torch.addcmul(first * cosines, second, sines, value=-1),
                torch.addcmul(second * cosines, first, sines),
            ),
            -1,
        ).transpose(0, 1)[None]
        out, _ = paged_attention(
            layer.attention,
            turned[:, :heads],
            turned[:, heads:],
            qkv[:, both:].transpose(0, 1)[None],
            None,
            scaling=layer.scale,
            sliding_window=layer.window,
        )
        return out[0].reshape(tokens, -1)


def lean_step(model: Model) -> LeanStep | None:
    """The step of a model that agrees with the model itself; else None, and a log line says why."""
    try:
        want_room(model)
        step = LeanStep(model)
    except (NotOfThisKind, AttributeError) as error:  # a module may be named otherwise
        log.info("the draft runs as transformers' class: %s", error)
        return None
    differs = apart(model, step)
    if not differs <= _CLOSE:
        log.info("the draft runs as transformers' class: lean, logits differ by %.2g", differs)
        return None
    return step
