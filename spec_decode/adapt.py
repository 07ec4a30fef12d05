"""How many tokens to guess, for whom, by whom: as many as make tokens come faster, often none.

A step that verifies B guesses beside its own tokens gives answer i a number of tokens n_i, one and
the chances of its guesses, and takes draft(B) + verify(B) seconds, so it speaks n_i / seconds
tokens a second. Guesses are taken while the geometric mean of these speeds grows, and prompts that
wait for the step count as answers without a guess. (DSpark's B* and TurboSpec's goodput take the
sum of answers' tokens: there one with good guesses may make the steps of all the others longer, who
get nothing for it; with one answer, or equal ones, both are the same.) A guess's chance is that of
all before it, so the best B are a prefix of each answer's guesses.

Chances come from what was accepted before: of this answer, of its group, of everybody, each level
leaning on the next as long as it has seen little. Knows numbers; knows no model and no tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence as Many
from dataclasses import dataclass, field
from math import exp, log, log1p

# Of what was seen before, this is left after each draft: some twenty drafts count.
FADING = 0.95
# What is left each time that guesses are passed over for what is known of them.
FORGETTING = 0.98
# What a level counts against the one above it, in guesses.
LEANING = 8.0
# The chance of a guess before anything was seen.
FIRST_CHANCE = 0.6
CHANCE_MAX = 0.98
# A single guess below this chance is not worth a thought.
SURVIVAL_MIN = 0.02
# A token more is taken to cost at least this share of a step.
TOKEN_SHARE_MIN = 0.001
# After so many portions of guesses that made nothing faster, none that gives less will.
HOPELESS = 8
# Guessing has to promise so much more than not guessing to be begun, and this to be gone on with.
BEGIN_GAIN, STAY_GAIN = 1.06, 1.01
# Looking in vain may take this share of the time in the long run. After some vain looks in a row
# steps rest between them, longer and longer until the share is reached.
LOOK_SHARE = 0.004
PATIENCE = 4
REST_STEPS_MAX = 256
# A batch this much smaller than the one in which it was given up is looked at again at once; and
# one that is as much larger.
SMALLER_BATCH = 0.75
GROUPS_MAX = 256
# The length of an answer before any has ended.
FIRST_LENGTH = 64.0


@dataclass(slots=True)
class Chances:
    """How often guesses are right: fading counts of those that were reached and were accepted."""

    reached: float = 0.0
    right: float = 0.0

    def observe(self, guessed: int, accepted: int) -> None:
        """`accepted` of a draft of `guessed` tokens; behind the first wrong one nobody knows."""
        self.reached = self.reached * FADING + min(guessed, accepted + 1)
        self.right = self.right * FADING + accepted

    def forget(self) -> None:
        """A guess was not worth its cost: what made it so loses weight, so that it is tried again
        some day."""
        self.reached *= FORGETTING
        self.right *= FORGETTING

    def rate(self, before: float) -> float:
        """The chance of a guess, leaning on `before` as long as little was seen."""
        return (self.right + LEANING * before) / (self.reached + LEANING)


Kind = tuple[str, int]  # a proposer and its trust


@dataclass(slots=True)
class History:
    """What became of guesses: of everybody's, by tier and by route, by answer."""

    everybody: dict[Kind, Chances] = field(default_factory=dict)
    groups: OrderedDict[Hashable, dict[Kind, Chances]] = field(default_factory=OrderedDict)
    answers: dict[int, dict[Kind, Chances]] = field(default_factory=dict)

    def observe(
        self, kind: Kind, key: int, groups: Many[Hashable], guessed: int, accepted: int
    ) -> None:
        """`accepted` of `guessed` tokens of an answer; of its `groups` the widest comes first."""
        levels = [self.everybody, self.answers.setdefault(key, {})]
        for group in groups:
            if group not in self.groups:
                while len(self.groups) >= GROUPS_MAX:
                    self.groups.popitem(last=False)
                self.groups[group] = {}
            levels.append(self.groups[group])
        for level in levels:
            level.setdefault(kind, Chances()).observe(guessed, accepted)

    def rate(self, kind: Kind, key: int, groups: Many[Hashable]) -> float:
        """The chance of a guess of this kind for this answer, given those before it are right."""
        rate = FIRST_CHANCE
        levels = [self.everybody, *map(self.groups.get, groups), self.answers.get(key)]
        for level in levels:
            seen = level.get(kind) if level else None
            if seen is not None:
                rate = seen.rate(rate)
        return min(rate, CHANCE_MAX)

    def forget(self, passed: Many[tuple[Kind, int, Many[Hashable]]]) -> None:
        """These kinds of guesses were passed over in a step, for these answers and their groups."""
        everybody = {kind for kind, _, _ in passed}
        grouped = {(kind, group) for kind, _, groups in passed for group in groups}
        levels = [(kind, self.everybody) for kind in everybody]
        levels += [(kind, self.groups.get(group, {})) for kind, group in grouped]
        levels += [(kind, self.answers.get(key, {})) for kind, key, _ in passed]
        for kind, level in levels:
            if kind in level:
                level[kind].forget()

    def end(self, key: int) -> None:
        self.answers.pop(key, None)


@dataclass(frozen=True, slots=True)
class Offer:
    """`most` guesses for one answer, each with the chance `rate` after those before. Where they are
    `priced`, a draft has to run, and to read for `read_s` seconds first."""

    most: int
    rate: float
    priced: bool = False
    read_s: float = 0.0


# Seconds of one pass of a draft over so many answers.
PassCost = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Budget:
    """How many guesses each offer gets."""

    counts: list[int]
    gain: float  # how much faster the step is for everybody, in the geometric mean


def best_budget(
    offers: Many[Offer],
    answers: int,
    steps_s: Iterable[float],
    pass_s: PassCost,
    room: int,
    span_s: float = 0.0,
    waiting: int = 0,
) -> Budget:
    """The B* of a step with so many answers, with room for `room` guesses; `waiting`: prompts.
    `steps_s` has the seconds of the step without a guess, with one, with two, ...; who guesses at
    all costs `span_s` more."""
    everybody = answers + waiting
    seconds_of = iter(steps_s)
    plain_s = seconds = next(seconds_of)
    after_s = next(seconds_of)
    token_s = max(after_s - plain_s, plain_s * TOKEN_SHARE_MIN)
    counts = [0] * len(offers)
    beside_s, guesses = 0.0, 0
    # Sums over answers of the logarithms: of n_i, and of how much faster each one is at best.
    won, best_gain, best = 0.0, 0.0, 0
    passes = _Passes(pass_s)
    portions = _portions(offers, token_s, pass_s, room, span_s)
    for at, (_, number, more, wins) in enumerate(portions, start=1):
        if guesses + more > room:
            break
        if not counts[number]:
            beside_s += span_s
        if offers[number].priced:
            beside_s += passes.more(counts[number], more)
            beside_s += 0.0 if counts[number] else offers[number].read_s
        counts[number] += more
        won += wins
        guesses += more
        for _ in range(more):
            seconds, after_s = after_s, next(seconds_of)
        gain = won - everybody * log((seconds + beside_s) / plain_s)
        if gain > best_gain:
            best_gain, best = gain, at
        elif at - best >= HOPELESS:
            break
    counts = [0] * len(offers)
    for _, number, more, _ in portions[:best]:
        counts[number] += more
    return Budget(counts, exp(best_gain / everybody))


@dataclass(slots=True)
class _Passes:
    """A draft's passes, and how many answers each of them guesses for."""

    cost: PassCost
    rows: list[int] = field(default_factory=list)

    def more(self, place: int, count: int) -> float:
        """Seconds that an answer's guesses from this place on add."""
        added_s = 0.0
        for at in range(place, place + count):
            if at == len(self.rows):
                self.rows.append(0)
            before = self.rows[at]
            added_s += self.cost(before + 1) - (self.cost(before) if before else 0.0)
            self.rows[at] += 1
        return added_s


# Minus what a second of it wins, the number of the offer, guesses, and what it wins: the logarithm
# of how many times as many tokens its answer gets.
_Portion = tuple[float, int, int, float]


def _portions(
    offers: Many[Offer], token_s: float, pass_s: PassCost, room: int, span_s: float
) -> list[_Portion]:
    """All guesses in the order in which they are taken: first who gives most for what it costs."""
    drafted = sum(offer.priced for offer in offers)
    drafted_s = token_s + pass_s(drafted) / drafted if drafted else token_s
    portions: list[_Portion] = []
    for number, offer in enumerate(offers):
        each_s = drafted_s if offer.priced else token_s
        first_s = span_s + offer.read_s if offer.priced else span_s
        portions += _cut(number, offer.rate, min(offer.most, room), each_s, first_s)
    if len(offers) > 1:
        portions.sort()
    return portions


def _cut(number: int, rate: float, most: int, token_s: float, first_s: float) -> list[_Portion]:
    """The guesses of an offer, each costing `token_s` and the first one `first_s` more, in the
    order of being taken. The first ones are one portion as long as another makes them worth more.
    """
    portions: list[_Portion] = []
    chance, said = 1.0, 1.0
    wins, seconds, count = 0.0, first_s, 0
    for _ in range(most):
        chance *= rate
        if chance < SURVIVAL_MIN:
            break
        win = log1p(chance / said)
        said += chance
        if count and win * seconds <= wins * token_s:
            portions.append((-wins / seconds, number, count, wins))
            wins, seconds, count = 0.0, 0.0, 0
        wins, seconds, count = wins + win, seconds + token_s, count + 1
    if count:
        portions.append((-wins / seconds, number, count, wins))
    return portions


@dataclass(slots=True)
class Rest:
    """Whether it is worth looking at all: with hysteresis, and with pauses where it was not."""

    guessing: bool = False
    answers: int = 0  # of the step in which it was given up
    _left: int = 0
    _vain: int = 0  # looks in a row

    def rests(self, answers: int) -> bool:
        """True for a step in which nothing is looked at."""
        if self._left <= 0:
            return False
        if not SMALLER_BATCH < answers / self.answers < 1 / SMALLER_BATCH:
            self._left, self._vain = 0, min(self._vain, PATIENCE)
            return False
        self._left -= 1
        return True

    def judge(self, gain: float, answers: int, look_share: float) -> bool:
        """Whether to guess, when it promises `gain` times the speed. `look_share` is how long it
        took to find that out, of what the step takes."""
        self.guessing = gain >= (STAY_GAIN if self.guessing else BEGIN_GAIN)
        self._vain = 0 if self.guessing else self._vain + 1
        if self._vain > PATIENCE:
            self.answers = answers
            longest = min(int(look_share / LOOK_SHARE), REST_STEPS_MAX)
            self._left = min(longest, 2 ** min(self._vain - PATIENCE - 1, 8))
        return self.guessing


@dataclass(slots=True)
class Lengths:
    """How long answers of a group are, to tell how many steps what is read now will serve."""

    means: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)

    def observe(self, group: Hashable, tokens: int) -> None:
        before = self.means.pop(group, None)
        while len(self.means) >= GROUPS_MAX:
            self.means.popitem(last=False)
        self.means[group] = tokens if before is None else before + (tokens - before) * 0.1

    def left(self, group: Hashable, said: int, most: int) -> float:
        """Tokens that are still to come of an answer that has said so many and may say so many."""
        mean = self.means.get(group, FIRST_LENGTH)
        return max(1.0, min(float(most), max(mean, 1.5 * said) - said))
