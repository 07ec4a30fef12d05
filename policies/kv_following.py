"""Where servers that run elsewhere tell of their KV cache, so that the gateway can follow."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from policies.fields import LAST_PORT, PolicyModel, publisher_endpoint, tcp_ports


class FollowedEvents(PolicyModel):
    """KV-cache events of vLLM or SGLang (`--kv-events-config`): see docs/gateway.md."""

    endpoint: Annotated[str, AfterValidator(publisher_endpoint)] = Field(
        description="Where they are published, as seen from here: `tcp://HOST:PORT` or `ipc://`. "
        "Rank r of a data-parallel server: the port r above.",
    )
    replay_endpoint: Annotated[str, AfterValidator(publisher_endpoint)] | None = Field(
        None,
        description="Where missed ones are asked for, by the same rules. Without it a server that "
        "was there before the gateway is never known exactly.",
    )
    topic: str = Field(
        "", max_length=256, description="Only events whose topic begins so are followed."
    )
    bind: bool = Field(
        False,
        description="The server connects to us: `endpoint` is an address of this machine. Whoever "
        "can reach it can tell lies about caches, so let it be loopback or a private network's.",
    )
    ranks: int = Field(1, ge=1, le=64, description="Data-parallel ranks that publish.")

    @model_validator(mode="after")
    def _ports_exist(self) -> FollowedEvents:
        ports = tcp_ports(self.endpoint, self.replay_endpoint)
        if any(port + self.ranks - 1 > LAST_PORT for port in ports):
            raise ValueError(f"the ports of {self.ranks} ranks end beyond {LAST_PORT}")
        return self
