"""Replicas that come and go: a file that lists them, or the addresses of a name.

Knows where to look and what changed; what follows for requests is the pool's. A look that fails
changes nothing: a resolver that is down must not empty the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.replica import Replica
from policies.discovery import Discovery, Member
from policies.load import FLEET_KEY_ENV, PolicyError, load_members
from runtime.wire import RUN_TOKEN_ENV

log = logging.getLogger("headgate.gateway")

LOOK_S = 5.0  # longest wait for a file system or a resolver


class NotFound(Exception):
    """The source could not be read, or names nobody."""


@dataclass(slots=True)
class File:
    """A list in a file, read when its place, size or time has changed."""

    path: str
    _seen: tuple[int, ...] = ()

    async def members(self) -> tuple[Member, ...] | None:
        """None: as before. Raises NotFound."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> tuple[Member, ...] | None:
        try:
            stat = Path(self.path).stat()
        except OSError as error:
            raise NotFound(f"{self.path}: {error.strerror}") from None
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            return load_members(self.path).replicas
        except PolicyError as error:
            raise NotFound(str(error)) from None


@dataclass(frozen=True, slots=True)
class Dns:
    """The addresses of a name, asked for each time."""

    name: str
    port: int

    async def members(self) -> tuple[Member, ...]:
        """Raises NotFound."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self.name, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise NotFound(f"{self.name}: {error.strerror or error}") from None
        hosts = sorted({str(address[0]) for *_, address in found})
        return tuple(Member(url=f"http://{_in_url(host)}:{self.port}") for host in hosts)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(slots=True)
class Source:
    """One entry of the policy's `discovery`, and the replicas that came of it."""

    policy: Discovery
    api_key: str | None = field(default=None, repr=False)
    run_token: str | None = field(default=None, repr=False)  # which our own fleet's workers know
    own: bool = False
    replicas: dict[str, Replica] = field(default_factory=dict)
    error: str | None = None
    _place: File | Dns = field(init=False, repr=False)

    def __post_init__(self) -> None:
        policy = self.policy
        if policy.dns is not None and policy.port is not None:
            self._place = Dns(policy.dns, policy.port)
        else:
            self._place = File(str(policy.file))

    async def look(self, join: Callable[[Replica], Replica]) -> None:
        """Brings `replicas` in line with the source. `join` takes a new one into the pool, or gives
        the one that it knows already. Those that are gone drain."""
        try:
            async with asyncio.timeout(LOOK_S):
                members = await self._place.members()
        except (NotFound, TimeoutError) as error:
            self._complain(str(error) or f"no answer within {LOOK_S:g} s")
            return
        self.error = None
        if members is None:
            return
        named = {member.url: member for member in members}
        for url, member in named.items():
            folder = Path(self.policy.tokenizer) if self.policy.tokenizer else None
            known = self.replicas.get(url)
            replica = known or join(self._replica(url, folder))
            replica.kind = self.policy.kind
            replica.weight = member.weight or self.policy.weight
            replica.draining = member.drain
            replica.gone = False
            self.replicas[url] = replica
        for url, replica in self.replicas.items():
            if url not in named:
                replica.draining = True
                replica.gone = True

    def _replica(self, url: str, folder: Path | None) -> Replica:
        token = self.run_token
        events = self.policy.kv_events
        publishes = events.at(url) if events is not None else None
        return Replica(url, self.own, self.api_key, token, tokenizer=folder, publishes=publishes)

    def prune(self) -> list[Replica]:
        """Those that are gone and have nothing under way any more."""
        left = [one for one in self.replicas.values() if one.gone and not one.in_flight]
        for replica in left:
            del self.replicas[replica.url]
        return left

    def _complain(self, error: str) -> None:
        if error != self.error:
            log.warning("discovery goes on with what it knows: %s", error)
        self.error = error


def sources_of(
    entries: tuple[Discovery, ...], environ: Mapping[str, str] = os.environ
) -> tuple[Source, ...]:
    """The policy's sources, each with its key. Raises KeyError for a key that is not set."""
    return tuple(_source(entry, environ) for entry in entries)


def _source(entry: Discovery, environ: Mapping[str, str]) -> Source:
    key = environ[entry.api_key_env].strip() if entry.api_key_env else None
    if entry.api_key_env != FLEET_KEY_ENV:
        return Source(entry, key)
    return Source(entry, key, environ.get(RUN_TOKEN_ENV), own=True)
