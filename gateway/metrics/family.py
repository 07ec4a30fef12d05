"""One metric: its name, what it means, its labels, and how its number is found in a reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.edge import Edge, Live

if TYPE_CHECKING:
    from policies.standing import Standing

PREFIX = "headgate_gateway_"

Values = float | Mapping[tuple[str, ...], float]


def by_name(values: Mapping[str, float]) -> Values:
    return {(name,): value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a page is made of, at one moment."""

    live: Live
    rollout: Mapping[str, Any] | None  # as this process goes by it
    now: float  # seconds since 1970

    @property
    def edge(self) -> Edge:
        return self.live.edge

    @property
    def standings(self) -> Sequence[Standing]:
        return self.live.gated.standings if self.live.gated is not None else ()


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: a value, or values by what its labels are. Nothing where it does not apply."""

    name: str
    text: str
    read: Callable[[Reading], Values]
    labels: tuple[str, ...] = ()
