"""`gateway.admin`: who may steer rollouts, and how the gateway watches over a candidate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from policies.fields import VARIABLE, PolicyModel

Variable = Annotated[str, StringConstraints(pattern=VARIABLE)]


class Admin(PolicyModel):
    """The paths below `/admin` and `/gate`."""

    key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with the key for `/admin` and `/gate`, and for "
        "`/metrics` where there are `tenants`. Without one the former are there for this machine "
        "alone, and not at all where there are `tenants`, whose keys then open the latter.",
    )
    candidate_keys: tuple[Variable, ...] = Field(
        (),
        strict=False,
        max_length=64,
        description="Environment variables whose keys a rollout's candidate may be asked with, "
        "beside those that the policy's own replicas are asked with.",
    )
    observations: int = Field(
        10_000,
        ge=100,
        le=10**6,
        description="Live observations that are kept for a rollout to read; no text is in them.",
    )
    window_s: float = Field(
        30.0,
        gt=0,
        le=600,
        description="How far back a candidate's failures count that end a rollout at once.",
    )
    patience_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Longest wait for a candidate's first byte; then the baseline answers instead.",
    )
    shadows: int = Field(
        8,
        ge=1,
        le=1024,
        description="Mirrored requests at once in one gateway process; beyond, none is mirrored.",
    )
