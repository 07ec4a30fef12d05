"""What a policy file says of faults: retries, the circuit of a replica, hedging, resuming."""

from __future__ import annotations

from pydantic import Field

from policies.fields import PolicyModel


class Retries(PolicyModel):
    """When a request is sent again, before its client got a byte of an answer."""

    max_attempts: int = Field(
        3, ge=1, le=16, description="Attempts of one request, the first one included; 1: no retry."
    )
    budget_share: float = Field(
        0.2, ge=0, le=1, description="Retries in ten seconds, as a share of the requests in them."
    )
    budget_min_per_s: float = Field(
        1.0, ge=0, le=1000, description="Retries a second that are allowed however few requests."
    )
    retry_after_max_s: float = Field(
        2.0,
        ge=0,
        le=300,
        description="Longest Retry-After that is waited for, where no other replica is left.",
    )
    headers_failover_s: float | None = Field(
        30.0,
        gt=0,
        le=86400,
        description="A stream whose headers take longer is asked for elsewhere, where it can be.",
    )
    ttft_failover_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="A stream whose first token takes longer is asked for elsewhere, where it can "
        "be.",
    )


class Breaker(PolicyModel):
    """When a replica is left alone because it fails, though its health says that it is well."""

    failures: int = Field(
        5, ge=1, le=1000, description="Failures in a row that open a replica's circuit."
    )
    share: float = Field(
        0.5, gt=0, le=1, description="Share of failures in window_s that opens it, too."
    )
    min_requests: int = Field(
        20, ge=1, le=10**6, description="Requests in window_s from which on `share` counts."
    )
    window_s: float = Field(
        30.0, gt=0, le=3600, description="How far back failures are counted for `share`."
    )
    open_s: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="How long an open circuit waits for a trial; twice as long after each failed "
        "one, eight times at most.",
    )


class Hedge(PolicyModel):
    """When a second replica is asked while the first one is late."""

    after_s: float = Field(
        0.1, ge=0, le=600, description="No second attempt is begun before the first is this old."
    )
    ttft_s: float = Field(
        0.5,
        gt=0,
        le=3600,
        description="Target that a first token must be predicted to miss, where the request names "
        "none (`x-slo-ttft-ms`).",
    )
    budget_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Prompts sent twice in ten seconds, as a share of all that were sent, by size.",
    )
