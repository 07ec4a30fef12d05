"""The shape of a policy file: frozen models that forbid unknown keys. Knows no YAML and no files.

The parts stand in `edge.py` (the gateway), `discovery.py` (servers behind it), `slo.py` (its tiers
and tenants), `state.py` (what gateways share), `engine.py` (the runtime) and `gating.py` (what is
served only with a verdict) and `tracing.py`. Every field has a description; `docs/policy.md` is
tested to name each of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from policies.discovery import Discovery, Upstream
from policies.edge import Gateway
from policies.engine import (
    DiskTier,
    Guesses,
    KvEvents,
    Runtime,
    Speculation,
    Tiers,
    WeightFormat,
    Weights,
)
from policies.fields import PolicyModel, integer_one
from policies.fleet import Fleet
from policies.gating import Gate, Optimization
from policies.slo import Tenant, Tier
from policies.state import StateStore
from policies.tracing import Tracing

__all__ = [
    "Deployment",
    "Discovery",
    "DiskTier",
    "Gateway",
    "Guesses",
    "KvEvents",
    "Runtime",
    "Speculation",
    "StateStore",
    "Tenant",
    "Tier",
    "Tiers",
    "Tracing",
    "Upstream",
    "WeightFormat",
    "Weights",
]


class Deployment(PolicyModel):
    """A policy file, whole."""

    version: Annotated[Literal[1], BeforeValidator(integer_one)] = Field(
        description="Version of this schema."
    )
    gateway: Gateway = Field(Gateway(), description="The edge that clients talk to.")
    runtime: Runtime | None = Field(None, description="Our own engine on this machine.")
    upstreams: tuple[Upstream, ...] = Field(
        (), max_length=256, strict=False, description="Servers that run elsewhere."
    )
    discovery: tuple[Discovery, ...] = Field(
        (), max_length=64, strict=False, description="Servers that come and go, and where to look."
    )

    fleet: Fleet = Field(
        Fleet(), description="Replicas of the runtime on a Ray cluster (`headgate serve --on ray`)."
    )
    optimizations: tuple[Optimization, ...] = Field(
        (),
        max_length=64,
        strict=False,
        description="What is served beside the rest of this file once it has passed its gate, in "
        "this order: each was judged on top of those before it.",
    )
    gate: Gate = Field(Gate(), description="What lets an optimization go live.")
    tracing: Tracing = Field(
        Tracing(), description="Traces of requests: which are kept, and where they are sent."
    )

    @model_validator(mode="after")
    def _serves_something(self) -> Deployment:
        if self.runtime is None and not self.upstreams and not self.discovery:
            raise ValueError("nothing to serve: give `runtime`, `upstreams`, or both")
        return self

    @model_validator(mode="after")
    def _one_process_is_connected_to(self) -> Deployment:
        bound = any(one.kv_events is not None and one.kv_events.bind for one in self.upstreams)
        if bound and self.gateway.processes > 1:
            raise ValueError(
                "`kv_events.bind` is for one process: with `gateway.processes` above 1 let the "
                "server bind, and each process connect to it"
            )
        return self
