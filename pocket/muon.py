"""Muon for the matrices inside the layers (Jordan et al. 2024), AdamW for the rest.

Written here rather than taken from torch.optim: the orthogonalization runs in float32, which is
twice as fast as bfloat16 on the CPUs that this recipe has to work on.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices [N, R, C], roughly, by a quintic Newton-Schulz step."""
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    nearest: Tensor = x.mT if tall else x
    return nearest


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; matrices of one shape are done together."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search
        assert closure is None, "this optimizer evaluates no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[tuple(matrix.shape)].append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates = orthogonalize(
                    torch.stack([self._nesterov(matrix, group["momentum"]) for matrix in matrices])
                )
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(matrices, updates.unbind(), strict=True):
                    matrix.sub_(update, alpha=rate)

    def _nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        assert matrix.grad is not None
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)


def build_optimizers(
    model: LlamaForCausalLM, matrix_rate: float, rest_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon over the layers' matrices and AdamW over embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=matrix_rate),
        torch.optim.AdamW(rest, lr=rest_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
