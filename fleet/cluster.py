"""What the fleet asks of a cluster, and what a replica is told. Knows no Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Lost(Exception):
    """A replica is gone, or cannot be had; says why. `refused`: another try would end like it."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class Unheard(Exception):
    """A replica, or whoever knows of it, has not answered; it may be well."""


class NoRoom(Exception):
    """No node of the domain had room in time."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a replica runs: a worker of the runtime by the policy that the fleet was started with.

    The policy travels; what it names lies at the same path on every node.
    """

    name: str
    policy: str  # path, which relative ones count from
    text: str = field(repr=False)  # of the policy
    version: str  # of this package
    rank: int
    key: str = field(repr=False)  # that its worker asks for
    environment: Mapping[str, str] = field(repr=False)
    lease_s: float  # a replica that nobody has looked at for so long ends itself
    drain_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """What a replica says of its worker."""

    running: bool  # its process
    last_words: tuple[str, ...] = ()


class Hosted(Protocol):
    """A replica on some node."""

    async def start(self) -> str:
        """The URL of its worker, once that is ready. Raises Lost, Unheard."""

    async def look(self) -> Look:
        """Renews its lease, too. Raises Lost, Unheard."""

    async def stop(self) -> None:
        """Lets the worker end in order; raises nothing."""


class Cluster(Protocol):
    """Nodes in failure domains."""

    async def domains(self) -> Sequence[str]:
        """Of the nodes that are alive and do work. Raises Lost."""

    async def place(
        self, name: str, domain: str | None, avoid: Collection[str], wait_s: float | None
    ) -> str:
        """Takes room for a replica in the domain, or in any but those to avoid; returns its domain.
        Raises NoRoom after `wait_s`, and has taken none then; Lost."""

    async def host(self, job: Job) -> Hosted:
        """A replica in the room that was taken by its name. Raises Lost."""

    async def release(self, name: str) -> None:
        """Ends the replica, if it is there, and gives its room back; raises nothing."""

    async def adopt(self) -> Mapping[str, tuple[str, Hosted]]:
        """What an earlier program of the same run has left: name -> domain, replica."""
