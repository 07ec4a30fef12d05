"""The gateway's part of a policy file: the edge that clients talk to, and servers behind it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from policies.fields import PolicyModel, base_url, loopback_address
from policies.retrying import Breaker, Hedge, Retries


class Gateway(PolicyModel):
    """The edge that clients talk to."""

    host: Annotated[str, AfterValidator(loopback_address)] = Field(
        "127.0.0.1", description="Address to listen on; loopback only."
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
        120.0, gt=0, le=86400, description="Longest silence of a replica inside a stream."
    )
    keep_alive_s: float = Field(
        10.0, gt=0, le=3600, description="An SSE comment is sent after this much silence."
    )
    drain_s: float = Field(
        20.0, ge=0, le=3600, description="How long running requests may go on after Ctrl-C."
    )
    max_in_flight: int = Field(
        1024,
        ge=1,
        le=10**6,
        description="Requests at once; more are refused with 503 and Retry-After.",
    )
    retries: Retries = Field(Retries(), description="When a request is sent again.")
    breaker: Breaker = Field(Breaker(), description="When a replica that fails is left alone.")
    hedge: Hedge | None = Field(
        None, description="Asks a second replica while the first one is late; off."
    )


class Upstream(PolicyModel):
    """An OpenAI-compatible server that runs elsewhere: vLLM, SGLang, another gateway."""

    url: Annotated[str, AfterValidator(base_url)] = Field(
        description="Base URL, with or without /v1."
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key sent to this server.",
    )
