"""The gateway's part of a policy file: the edge that clients talk to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from policies.admin import Admin
from policies.fields import VARIABLE, PolicyModel, refuse
from policies.recording import Record
from policies.retrying import Breaker, Hedge, Retries
from policies.routing import Routing
from policies.slo import (
    SHIPPED,
    Name,
    Tenant,
    Tier,
    TierTable,
    misfits,
    unknown_tenants,
    unknown_tiers,
)
from policies.state import StateStore
from policies.trimming import ResponseCache, Trim


class Gateway(PolicyModel):
    """The edge that clients talk to."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on; one that is not loopback needs `tenants` with keys.",
    )
    port: int = Field(
        8080,
        ge=0,
        le=65535,
        description="Port to listen on; HEADGATE_PORT overrides it; 0 takes a free one.",
    )
    max_body_bytes: int = Field(
        8 * 2**20, ge=1024, le=2**30, description="Larger request bodies are refused with 413."
    )
    body_timeout_s: float = Field(
        15.0,
        gt=0,
        le=600,
        description="A request whose headers or body take longer is refused with 408.",
    )
    connect_timeout_s: float = Field(
        5.0, gt=0, le=600, description="Longest wait for a connection to a replica."
    )
    first_byte_timeout_s: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="Longest wait for a replica's first byte, prefill included.",
    )
    idle_timeout_s: float = Field(
        120.0,
        gt=0,
        le=86400,
        description="Longest silence of a replica inside a stream, and of a client that takes "
        "nothing of its answer.",
    )
    keep_alive_s: float = Field(
        10.0, gt=0, le=3600, description="An SSE comment is sent after this much silence."
    )
    drain_s: float = Field(
        20.0, ge=0, le=3600, description="How long running requests may go on after Ctrl-C."
    )
    max_in_flight: int = Field(
        8192,
        ge=1,
        le=10**6,
        description="Requests at once, waiting ones included; more are refused with 503 and "
        "Retry-After.",
    )
    retries: Retries = Field(Retries(), description="When a request is sent again.")
    breaker: Breaker = Field(Breaker(), description="When a replica that fails is left alone.")
    routing: Routing = Field(Routing(), description="How a replica is chosen for a request.")
    hedge: Hedge | None = Field(
        None, description="Asks a second replica while the first one is late; off."
    )
    running_per_replica: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Requests at once on one replica; further ones wait in the gateway. null: "
        "`runtime.max_sequences` for own workers, 256 for other servers.",
    )
    resume: Literal["off", "auto"] = Field(
        "off",
        description="`auto` lets another replica go on with a stream that breaks: by its tokens or "
        "its text, where the replica can, or by the same answer again. Off for tool calls, set "
        "forms, logprobs and `n` above 1.",
    )
    total_timeout_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="Longest time of a whole request, until its client has all of the answer; "
        "none: no limit.",
    )
    tiers: TierTable = Field(
        {name: Tier(**tier) for name, tier in SHIPPED.items()},
        description="What requests of a kind are promised: changes to the tiers that ship, and "
        "further ones, by name.",
    )
    tenants: dict[Name, Tenant] = Field(
        {},
        description="Who may ask, by name. Empty: whoever runs on this machine, without a key.",
    )
    store: StateStore | None = Field(
        None, description="A Redis for what several gateways share; none: this process's memory."
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Gateway processes on the one port, started and watched by `headgate serve`; "
        "without `store` each gives its share of every limit.",
    )
    reload: Literal["watch", "signal"] = Field(
        "watch",
        description="When the policy file is read again: when it changes, and at SIGHUP to a "
        "gateway process; or only at the signal.",
    )
    secret_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with the secret that the salts of tenants are made of; "
        "the same for all gateways before the same replicas. Default: a new one at each start.",
    )
    trim: Trim = Field(Trim(), description="What is left out of prompts; nothing.")
    response_cache: ResponseCache | None = Field(
        None, description="Answers that are given again to the same request; off."
    )

    record: Record | None = Field(
        None, description="Requests and answers that are kept on disk, to replay them; none."
    )
    admin: Admin = Field(Admin(), description="Who may steer rollouts, and what ends them at once.")

    @model_validator(mode="after")
    def _fits_together(self) -> Gateway:
        refuse(misfits(self.host, self.tiers, self.tenants, self.admin.key_env))
        refuse(unknown_tiers(self.tiers, self.trim.tiers, "trim", "tiers"))
        if self.record is not None:
            refuse(unknown_tenants(self.tenants, self.record.tenants, "record", "tenants"))
        if self.response_cache is not None:
            named = self.response_cache.tiers
            refuse(unknown_tiers(self.tiers, named, "response_cache", "tiers"))
        return self
