"""What a gateway process works with, as one value that is replaced as a whole.

A request takes the edge that is current when it begins and keeps it to its end, so that a new
policy never changes what is under way.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.upstream import Pool
from policies.schema import Deployment, Gateway


@dataclass(frozen=True, slots=True)
class Edge:
    """The parts that serve by one policy."""

    policy: Deployment
    pool: Pool

    @property
    def settings(self) -> Gateway:
        return self.policy.gateway


@dataclass(slots=True)
class Live:
    """Holds the current edge; whoever replaces it starts the new one before and ends the old one
    when its last request has left."""

    edge: Edge
