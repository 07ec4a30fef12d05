"""Which failure domain gets the next replica, and which replica goes first. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, TypeVar


class Placed(Protocol):
    """A replica as far as its place goes."""

    @property
    def domain(self) -> str | None: ...
    @property
    def ready(self) -> bool: ...
    @property
    def busy(self) -> int: ...


_Placed = TypeVar("_Placed", bound=Placed)


def preferences(
    domains: Iterable[str], taken: Sequence[str], shunned: Collection[str], *, strict: bool
) -> list[str]:
    """Domains to try, the emptiest first; those where a replica has just been lost come last.

    `taken` has the domain of each replica that there is; with `strict` such a domain is none.
    """
    count = Counter(taken)
    free = [one for one in dict.fromkeys(domains) if not (strict and count[one])]
    return sorted(free, key=lambda one: (one in shunned, count[one], one))


def leaver(replicas: Sequence[_Placed]) -> _Placed:
    """Who is missed the least: one that is not ready, then from the fullest domain, then the least
    busy one. `replicas` are in the order of their age, and the youngest goes."""
    count = Counter(one.domain for one in replicas)
    return max(reversed(replicas), key=lambda one: (not one.ready, count[one.domain], -one.busy))
