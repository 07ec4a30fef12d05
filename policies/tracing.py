"""`tracing`: which requests leave a trace, where it goes, and how many are kept in memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from policies.fields import PolicyModel, base_url

Always = Literal["canary", "error", "late", "slow"]
ALWAYS: tuple[Always, ...] = ("canary", "error", "late", "slow")


class Tracing(PolicyModel):
    """Traces of requests, through the gateway and into the workers."""

    endpoint: Annotated[str, AfterValidator(base_url)] | None = Field(
        None,
        max_length=2048,
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP), such as "
        "http://127.0.0.1:4318. null: what OTEL_EXPORTER_OTLP_ENDPOINT says; nothing is sent where "
        "neither is set.",
    )
    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of new traces that are sent; a client's own `traceparent` says so for "
        "its request.",
    )
    always: tuple[Always, ...] = Field(
        ALWAYS,
        strict=False,
        max_length=len(ALWAYS),
        description="Whose trace is sent all the same, and marked (`headgate.keep`), once the "
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
        description="Latest traces that each process keeps in memory, sent or not, for "
        "`/admin/traces`, the console and `headgate trace`, and as many older ones of those that "
        "`always` names, in equal shares; 0: none.",
    )
