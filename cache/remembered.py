"""What a process remembers of the rules in a store elsewhere, for when that is away or forgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache.memory_store import Expiring, Level
from cache.store import Taken, Want

Heard = dict[str, tuple[Want, Level]]


class Remembered:
    """What was left of each rule. What the store says counts once it is sure that the store had
    forgotten nothing when it said so; until then, what was known less what was taken here."""

    def __init__(self, clock: Callable[[], float], keys_max: int) -> None:
        self._clock = clock
        self._rules: Expiring[tuple[Want, Level]] = Expiring(keys_max)
        self._heard: Heard = {}

    def learn(self, wants: Sequence[Want], taken: Taken) -> None:
        """The answer to a `take`."""
        now = self._clock()
        for want, left in zip(wants, taken.left, strict=True):
            self._heard[want.key] = want, Level(left, now)
            if self._rules.get(want.key, now) is None:
                self._set(want, left)
            elif taken.allowed:
                self._set(want, self.left(want) - want.amount)

    def heard(self) -> Heard:
        """What was heard since the last call, for `believe`."""
        heard, self._heard = self._heard, {}
        return heard

    def believe(self, heard: Heard) -> None:
        now = self._clock()
        for name, (want, level) in heard.items():
            self._rules.set(name, (want, level), level.expires_at(want.rule), now)

    def changed(self, change: Want) -> None:
        """A settlement that the store has got."""
        self._set(change, min(change.rule.capacity, self.left(change) + change.amount))

    def left(self, want: Want) -> float:
        now = self._clock()
        known = self._rules.get(want.key, now)
        return known[1].refill(want.rule, now) if known else want.rule.capacity

    def all_left(self) -> list[Want]:
        """Each rule with what is left of it as its amount."""
        now = self._clock()
        known = self._rules.items_at(now).values()
        return [want._replace(amount=level.refill(want.rule, now)) for want, level in known]

    def _set(self, want: Want, left: float) -> None:
        now = self._clock()
        level = Level(left, now)
        self._rules.set(want.key, (want, level), level.expires_at(want.rule), now)
