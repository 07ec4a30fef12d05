"""`gateway.admin`: who may steer rollouts, and how the gateway watches over a candidate."""

from __future__ import annotations

from pydantic import Field

from policies.fields import VARIABLE, PolicyModel


class Admin(PolicyModel):
    """The paths below `/admin` and `/gate`."""

    key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with the key for `/admin` and `/gate`. Without one they "
        "are there for this machine alone, and not at all where there are `tenants`.",
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
