"""Which fields of a policy are optimizations, and what each of them can do to answers.

A hypothesis may change these and nothing else; what is stricter than the change that it says it is
needs the kind of change that allows it. Knows no hypothesis and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Kind = Literal[
    "lossless_exact", "lossless_distribution", "lossy_model", "lossy_input", "routing_only"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Path of the field -> the mildest kind of change that it can be.
KNOBS: Mapping[str, Kind] = {
    "gateway.hedge": "routing_only",
    "gateway.processes": "routing_only",
    "gateway.response_cache": "lossy_input",  # an old answer, to a request that only looks the same
    "gateway.retries": "routing_only",
    "gateway.routing": "routing_only",
    "gateway.running_per_replica": "routing_only",
    "gateway.tiers": "routing_only",
    "gateway.trim": "lossy_input",
    "runtime.compile": "lossless_exact",
    "runtime.device": "lossless_exact",
    "runtime.dtype": "lossy_model",
    "runtime.kv": "lossy_model",
    "runtime.kv_events": "routing_only",
    "runtime.kv_tokens": "lossless_exact",
    "runtime.max_sequences": "lossless_exact",
    "runtime.max_waiting": "routing_only",
    "runtime.model": "lossy_model",
    "runtime.revision": "lossy_model",
    "runtime.speculation": "lossless_distribution",
    "runtime.step_tokens": "lossless_exact",
    "runtime.threads": "lossless_exact",
    "runtime.tiers": "lossless_exact",
    "runtime.tpot_ms": "lossless_exact",
    "runtime.weights": "lossy_model",
    "runtime.workers": "routing_only",
}

# Kind of change -> the knobs that it may touch, by their own kind.
_ALLOWS: Mapping[Kind, frozenset[Kind]] = {
    "routing_only": frozenset({"routing_only"}),
    "lossless_exact": frozenset({"routing_only", "lossless_exact"}),
    "lossless_distribution": frozenset(
        {"routing_only", "lossless_exact", "lossless_distribution"}
    ),
    "lossy_model": frozenset(
        {"routing_only", "lossless_exact", "lossless_distribution", "lossy_model"}
    ),
    "lossy_input": frozenset(
        {"routing_only", "lossless_exact", "lossless_distribution", "lossy_input"}
    ),
}  # fmt: skip


def knob_of(path: str) -> str | None:
    """The knob that a field belongs to: `gateway.trim.drop` to `gateway.trim`; None: to none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in KNOBS:
            return name
    return None


def allowed(kind: Kind, knob: str) -> bool:
    """Whether a change of this kind may touch the knob."""
    return KNOBS[knob] in _ALLOWS[kind]


def kinds_for(knob: str) -> tuple[Kind, ...]:
    """The kinds of change that may touch a knob."""
    return tuple(kind for kind in KINDS if allowed(kind, knob))
