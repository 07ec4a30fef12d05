"""A model's own attention over the proof's prompts, layer by layer, and ours held against it.

Where layers round their input, the last digit of a float can move a step of eight bits, and each
layer makes more of that: the logits of two right computations lie apart by a tenth. So attention is
compared where it happens. What goes into each attention module and what its attention gives is
recorded from transformers' own (`eager`); in the paged run each gets and gives the recorded values,
so that every layer meets what it met before, and what differs is attention alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What transformers' families call the function that they fall back on; it has no registered name.
_OWN = "eager_attention_forward"
_REFERENCE = "eager"

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class NotObserved(Exception):
    """An attention module does not tell what it takes and gives; says which class."""


@dataclass(slots=True)
class Record:
    """Of one attention module, [T, ...] each: all tokens of all prompts behind one another."""

    own: Attention
    hidden: torch.Tensor | None = None  # the module's input
    passed: torch.Tensor | None = None  # what attention gave, in the dtype of the activations
    exact: torch.Tensor | None = None  # the same, computed in fp32 from the same queries
    apart: float = 0.0  # the largest difference that was found


@dataclass(slots=True)
class OwnAttention:
    """What was recorded of each attention module, and which tokens the current step consists of."""

    lengths: Sequence[int]  # of the prompts
    records: dict[nn.Module, Record] = field(default_factory=dict)
    _rows: list[int] = field(default_factory=list)

    def step(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """The next step has these tokens: (prompt, position of the first, count) each."""
        begins = [sum(self.lengths[:number]) for number in range(len(self.lengths))]
        self._rows = [begins[prompt] + at + i for prompt, at, count in parts for i in range(count)]

    # ---- recording -------------------------------------------------------------------------------

    @contextmanager
    def recording(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, a forward pass over the padded prompts by transformers' own attention is kept."""
        self.records = {module: Record(own_attention(module)) for module in modules}
        with ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
                stack.callback(hook.remove)
            # A local entry of this name goes before the family's own function, which it calls.
            ALL_ATTENTION_FUNCTIONS[_REFERENCE] = self._record
            stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, _REFERENCE)
            yield
        for module, record in self.records.items():
            if record.hidden is None or record.passed is None:
                raise NotObserved(f"{type(module).__name__} was not seen attending by itself")

    def _record(
        self, caller: nn.Module, *tensors: torch.Tensor, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        record = self.records[caller]
        output, weights = record.own(caller, *tensors, **more)
        record.passed = record.exact = self._unpadded(output)
        if output.dtype != torch.float32:
            whole = [one.float() if isinstance(one, torch.Tensor) else one for one in tensors]
            record.exact = self._unpadded(record.own(caller, *whole, **more)[0])
        return output, weights

    def _keep_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            self.records[module].hidden = self._unpadded(hidden)

    def _unpadded(self, padded: torch.Tensor) -> torch.Tensor:
        """[prompts, longest, ...] -> [T, ...]."""
        return torch.cat(
            [row[:length] for row, length in zip(padded, self.lengths, strict=True)]
        ).clone()

    # ---- comparing -------------------------------------------------------------------------------

    @contextmanager
    def compared(self, name: str, paged: Attention) -> Iterator[None]:
        """Inside, the attention that is registered as `name` is held against what was recorded.

        Steps are announced by `step`. The first module's input is left as it comes: what is wrong
        before any attention shows there.
        """

        def compare(
            caller: nn.Module, *tensors: torch.Tensor, **more: Any
        ) -> tuple[torch.Tensor, None]:
            record = self.records[caller]
            assert record.exact is not None and record.passed is not None
            found, _ = paged(caller, *tensors, **more)
            record.apart = max(record.apart, _apart(found[0], record.exact, self._rows))
            return record.passed[self._rows][None], None

        with ExitStack() as stack:
            for module in list(self.records)[1:]:
                hook = module.register_forward_pre_hook(self._give_input, with_kwargs=True)
                stack.callback(hook.remove)
            AttentionInterface.register(name, compare)
            stack.callback(AttentionInterface.register, name, paged)
            yield

    def _give_input(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        hidden = self.records[module].hidden
        assert hidden is not None
        own = hidden[self._rows][None]
        if args:
            return (own, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": own}


def own_attention(module: nn.Module) -> Attention:
    """What a family attends with by itself: a function beside the class. Raises NotObserved."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            own: Attention | None = getattr(sys.modules[kind.__module__], _OWN, None)
            if own is not None:
                return own
            break
    raise NotObserved(f"{type(module).__name__} has no {_OWN} beside it")


def _apart(found: torch.Tensor, exact: torch.Tensor, rows: list[int]) -> float:
    """The largest relative difference of a token; small ones count against the layer's mean."""
    norms = exact.float().flatten(1).norm(dim=1)
    far = (found.float() - exact[rows].float()).flatten(1).norm(dim=1)
    apart = (far / norms[rows].clamp(min=float(norms.mean()))).max()
    return float(apart) if torch.isfinite(apart) else float("inf")
