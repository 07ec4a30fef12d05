"""Which replica answers. Pure: knows loads and models, opens nothing."""

from __future__ import annotations

import random
from collections.abc import Container, Iterable
from typing import Protocol, TypeVar

from gateway.replica import Elsewhere


class Candidate(Protocol):
    """What the choice looks at."""

    @property
    def healthy(self) -> bool: ...
    @property
    def models(self) -> Container[str]: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def elsewhere(self) -> Elsewhere: ...
    @property
    def weight(self) -> float: ...


C = TypeVar("C", bound=Candidate)


def choose(replicas: Iterable[C], model: str, rng: random.Random) -> C | None:
    """The healthy replica that serves `model` and has, with this request, the least in flight for
    its weight; None when there is none.

    Ties are broken at random: by index, an idle fleet would send all requests to its first replica.
    """
    least: list[C] = []
    least_load = 0.0
    for replica in replicas:
        if not replica.healthy or model not in replica.models:
            continue
        load = (replica.in_flight + replica.elsewhere.running + 1) / replica.weight
        if not least or load < least_load:
            least, least_load = [replica], load
        elif load == least_load:
            least.append(replica)
    if len(least) > 1:
        return rng.choice(least)
    return least[0] if least else None
