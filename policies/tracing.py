"""`tracing`: which requests leave a trace, and how many are kept in memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from policies.fields import PolicyModel

Always = Literal["canary", "error", "late", "slow"]
ALWAYS: tuple[Always, ...] = ("canary", "error", "late", "slow")


class Tracing(PolicyModel):
    """Traces of requests, through the gateway and into the workers."""

    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of new traces that are marked to be sampled; a client's own "
        "`traceparent` says so for its request.",
    )
    always: tuple[Always, ...] = Field(
        ALWAYS,
        strict=False,
        max_length=len(ALWAYS),
        description="Whose trace is marked to be kept (`headgate.keep`), sampled or not, once the "
        "request has ended: answered by a candidate, failed, later than its tier's targets, slower "
        "than `slow_s`.",
    )
    slow_s: float = Field(
        30.0, gt=0, le=86400, description="A request that takes longer is `slow`."
    )
    keep: int = Field(
        256,
        ge=0,
        le=100_000,
        description="Latest traces that each process keeps in memory, sampled or not, for "
        "`/admin/traces`, the console and `headgate trace`; 0: none.",
    )
