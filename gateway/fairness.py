"""Whose turn it is among tenants that wait: virtual token counters (Sheng et al., OSDI 2024).

Each tenant's counter says how much service it has had, in tokens by their price and its weight. The
least goes next, so that between any two that wait all the time the difference of what they got is
at most twice the larger of the dearest request and what was under way (theorem 4.4). A tenant that
comes back is lifted to those that wait: what it did not ask for is not owed to it.
"""

from __future__ import annotations

from collections.abc import Iterable

PROMPT_PRICE = 1.0
ANSWER_PRICE = 2.0  # a token of an answer takes a step of its own; the paper's and most price lists


def price(prompt_tokens: float, answer_tokens: float) -> float:
    """Service in prompt tokens."""
    return PROMPT_PRICE * prompt_tokens + ANSWER_PRICE * answer_tokens


class Counters:
    """The counters of the tenants of one tier."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._last = 0.0  # of the tenant that was served last

    def join(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant begins to wait, beside those that do."""
        least = min((self.served[other] for other in waiting), default=self._last)
        self.served[tenant] = max(self.served.get(tenant, 0.0), least)

    def next(self, waiting: Iterable[str]) -> str:
        """Who has had the least; one of them must wait."""
        return min(waiting, key=self.served.__getitem__)

    def charge(self, tenant: str, amount: float, weight: float) -> None:
        """Adds what a request takes; afterwards, with either sign, what it took beyond that."""
        self._last = self.served[tenant] = self.served.get(tenant, 0.0) + amount / weight
