"""Where servers that run elsewhere tell of their KV cache, so that the gateway can follow."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from policies.fields import LAST_PORT, PolicyModel, publisher_endpoint, tcp_ports


class HostsEvents(PolicyModel):
    """KV-cache events of servers that come and go, each at the same ports of its own host."""

    port: int = Field(
        ge=1,
        le=LAST_PORT,
        description="Port of each replica's host at which it publishes. Rank r of a data-parallel "
        "server: the port r above.",
    )
    replay_port: int | None = Field(
        None,
        ge=1,
        le=LAST_PORT,
        description="Where missed ones are asked for, by the same rules. Without it a server that "
        "was there before the gateway is never known exactly.",
    )
    topic: str = Field(
        "", max_length=256, description="Only events whose topic begins so are followed."
    )
    ranks: int = Field(1, ge=1, le=64, description="Data-parallel ranks that publish.")

    @model_validator(mode="after")
    def _ports_exist(self) -> HostsEvents:
        if max(self.port, self.replay_port or 0) + self.ranks - 1 > LAST_PORT:
            raise ValueError(f"the ports of {self.ranks} ranks end beyond {LAST_PORT}")
        return self

    def at(self, url: str) -> FollowedEvents:
        """Where the replica at this URL publishes."""
        host = urlsplit(url).hostname or ""
        host = f"[{host}]" if ":" in host else host
        replay = None if self.replay_port is None else f"tcp://{host}:{self.replay_port}"
        return FollowedEvents(
            endpoint=f"tcp://{host}:{self.port}",
            replay_endpoint=replay,
            topic=self.topic,
            ranks=self.ranks,
        )


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
