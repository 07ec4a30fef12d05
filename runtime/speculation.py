"""Which sequences of a step guess ahead, how far and by whom; and what became of it.

Knows plans, costs and proposers behind their protocol; knows no model and no logits. Where nothing
is guessed a step costs one comparison more. Budgets are `spec_decode.adapt`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence as Many
from dataclasses import dataclass, field
from itertools import count, takewhile
from time import perf_counter
from typing import NamedTuple

from runtime.costs import StepCosts, StepSize
from runtime.scheduler import Scheduler, Work, step_size
from runtime.scoring import scores_prompt
from runtime.sequence import Sequence
from spec_decode.adapt import Budget, History, Kind, Lengths, Offer, Rest, best_budget
from spec_decode.draft import GUESSES_MAX, Draft, Proposer

# A step without a table of costs: what a token more costs, of what the first one does.
_TOKEN_SHARE = 0.1
# How much one step's choosing tells of what choosing takes.
_LEARNING = 0.1


@dataclass(frozen=True, slots=True)
class Mode:
    """What answers of a tier or a model do: `proposer` by name, "auto" or "off"."""

    proposer: str = "auto"
    most: int = 7


OFF = Mode("off", 0)


@dataclass(frozen=True, slots=True)
class Modes:
    """The usual mode, and those of tiers and of models by their names; a model's goes first."""

    usual: Mode
    tiers: Mapping[str, Mode] = field(default_factory=dict)
    models: Mapping[str, Mode] = field(default_factory=dict)

    def of(self, sequence: Sequence) -> Mode:
        mode = self.models.get(sequence.adapter or "")
        return mode or self.tiers.get(sequence.service.tier, self.usual)


class _Known(NamedTuple):
    """What stays the same while a sequence runs."""

    mode: Mode
    groups: tuple[Hashable, ...]


class _Ready(NamedTuple):
    """A sequence at place `at` of the plan that has use for so many guesses."""

    at: int
    sequence: Sequence
    known: _Known
    most: int


class _Choice(NamedTuple):
    """So many guesses for the sequence of one work of the plan, by one proposer."""

    at: int
    proposer: int
    guesses: int
    kind: Kind


@dataclass(slots=True)
class Counts:
    """What was guessed so far; `accepted_at` counts the accepted ones, which were right and became
    tokens of an answer, by their place."""

    drafts: int = 0
    guessed: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * GUESSES_MAX)
    by_proposer: dict[tuple[str, ...], int] = field(default_factory=dict)
    rested: int = 0  # steps in which nothing was looked at
    seconds: float = 0.0  # of the engine's thread


@dataclass(slots=True, eq=False)
class Speculation:
    """Guesses for the engine."""

    proposers: Many[Proposer]
    modes: Modes
    counts: Counts = field(default_factory=Counts)
    history: History = field(default_factory=History)
    lengths: Lengths = field(default_factory=Lengths)
    timer: Callable[[], float] = perf_counter
    _rest: Rest = field(default_factory=Rest)
    _drafts_rest: Rest = field(default_factory=Rest)  # of those that cost something
    _kinds: dict[int, tuple[int, Kind]] = field(default_factory=dict)  # of drafts under way
    _known: dict[int, _Known] = field(default_factory=dict)
    _beside_s: float = 0.0
    _simple: bool = field(init=False)  # everybody is adaptive, and rests together
    _costly: list[bool] = field(init=False)  # of each proposer, whether its passes take time

    def __post_init__(self) -> None:
        modes = self.modes
        self._simple = modes.usual.proposer == "auto" and not (modes.tiers or modes.models)
        self._costly = [proposer.pass_s(1) > 0 for proposer in self.proposers]

    # ---- before a step ---------------------------------------------------------------------------

    def extend(self, plan: list[Work], scheduler: Scheduler) -> list[Work]:
        """The plan with guesses behind sequences that catch up, those of one token first."""
        if self._simple and self._rest.rests(len(plan)):
            self.counts.rested += 1
            return plan
        ready = []
        for at, work in enumerate(plan):
            if work.count == 1 and work.catches_up and not scores_prompt(work.sequence):
                one = self._ready(at, work.sequence)
                if one.most > 0:
                    ready.append(one)
        if not ready:
            return plan
        taken = sum(work.count for work in plan)
        room = min(scheduler.step_tokens - taken, scheduler.scored_rows - len(plan))
        choices = self._static(ready, room)
        room -= sum(choice.guesses for choice in choices)
        automatic = [one for one in ready if one.known.mode.proposer == "auto"]
        if automatic and room > 0:
            waiting = len(scheduler.waiting) + sum(work.count > 1 for work in plan)
            choices += self._adaptive(plan, automatic, scheduler.costs, room, waiting)
        return self._draft(plan, choices, scheduler) if choices else plan

    def _ready(self, at: int, sequence: Sequence) -> _Ready:
        known = self._known.get(sequence.key)
        if known is None:
            known = _Known(self.modes.of(sequence), _groups(sequence))
            self._known[sequence.key] = known
        # The last token of all need not be guessed.
        left = sequence.sampling.max_tokens - sequence.answer_tokens - 1
        return _Ready(at, sequence, known, min(known.mode.most, left))

    def _static(self, ready: list[_Ready], room: int) -> list[_Choice]:
        """Guesses of those whose policy names a proposer: as many as it says, and as the step has
        room for. Each guess is a row of logits, as wide as the vocabulary."""
        choices = []
        for one in ready:
            for number, proposer in enumerate(self.proposers):
                if proposer.name == one.known.mode.proposer:
                    outlook = proposer.outlook(one.sequence, one.most)
                    count = min(outlook.most, room) if outlook is not None else 0
                    if outlook is not None and count > 0:
                        kind = (proposer.name, outlook.trust)
                        choices.append(_Choice(one.at, number, count, kind))
                        room -= count
        return choices

    def _adaptive(
        self,
        plan: list[Work],
        ready: list[_Ready],
        costs: StepCosts | None,
        room: int,
        waiting: int,
    ) -> list[_Choice]:
        """Guesses as far as they make tokens come faster."""
        started = self.timer()
        dear = not self._drafts_rest.rests(len(ready))
        free, priced = self._offers(ready, dear=dear)
        decodes = [work for work in plan if work.count == 1]
        answers = len(decodes)
        context = sum(len(one.sequence.tokens) for one in ready) // len(ready)
        alone = step_size(decodes)
        whole = alone if answers == len(plan) else step_size(plan)
        step = _Step(alone, whole, context, self._beside_s)
        span_s = 0.0 if costs is None else costs.span_s

        def best(offered: list[_Offered]) -> Budget:
            offers = [one.offer for one in offered]
            steps_s = step.seconds(costs)
            return best_budget(offers, answers, steps_s, self._pass_s, room, span_s, waiting)

        plain_s = next(step.seconds(costs))
        chosen, budget = free, best(free)
        if priced:
            began = self.timer()
            mixed = _better(free, priced)
            other = best(mixed)
            look_share = (2.0 * self.timer() - 2.0 * began) / plain_s  # to offer takes as long
            if self._drafts_rest.judge(other.gain / budget.gain, len(ready), look_share):
                chosen, budget = mixed, other
        gain = budget.gain
        choices = [
            one.choice._replace(guesses=count)
            for one, count in zip(chosen, budget.counts, strict=True)
            if count
        ]
        took_s = self.timer() - started
        look_share = took_s / plain_s
        if not self._rest.judge(gain, len(plan), look_share):
            choices = []
        if choices:  # to verify takes about as long again as to choose
            self._beside_s += (2.0 * took_s - self._beside_s) * _LEARNING
        taken = {(choice.at, choice.proposer) for choice in choices}
        self._pass_over(ready, [*free, *priced], taken)
        return choices

    def _pass_s(self, rows: int) -> float:
        """Of the one proposer that costs anything."""
        return sum(proposer.pass_s(rows) for proposer in self.proposers)

    def _offers(self, ready: list[_Ready], *, dear: bool) -> tuple[list[_Offered], list[_Offered]]:
        """What could be guessed for nothing, one offer a sequence, and what at a price."""
        free: list[_Offered] = []
        priced: list[_Offered] = []
        for one in ready:
            best: _Offered | None = None
            for number, (proposer, costly) in enumerate(
                zip(self.proposers, self._costly, strict=True)
            ):
                if costly and not dear:
                    continue
                outlook = proposer.outlook(one.sequence, one.most)
                if outlook is None or outlook.most < 1:
                    continue
                kind = (proposer.name, outlook.trust)
                rate = self.history.rate(kind, one.sequence.key, one.known.groups)
                choice = _Choice(one.at, number, outlook.most, kind)
                if costly:
                    read_s = proposer.read_s(outlook.behind) / self._steps_left(one, rate)
                    priced.append(_Offered(Offer(outlook.most, rate, True, read_s), choice))
                elif best is None or rate > best.offer.rate:
                    best = _Offered(Offer(outlook.most, rate), choice)
            if best is not None:
                free.append(best)
        return free, priced

    def _steps_left(self, one: _Ready, rate: float) -> float:
        """In how many steps an answer will probably be done, its guesses being right so often."""
        said = one.sequence.answer_tokens
        most = one.sequence.sampling.max_tokens - said
        tokens = self.lengths.left(one.known.groups[-1], said, most)
        return max(1.0, tokens * (1.0 - rate))

    def _pass_over(
        self, ready: list[_Ready], offered: list[_Offered], taken: set[tuple[int, int]]
    ) -> None:
        """What was not taken is known a little less from now on."""
        by_place = {one.at: one for one in ready}
        passed = []
        for _, choice in offered:
            if (choice.at, choice.proposer) not in taken:
                one = by_place[choice.at]
                passed.append((choice.kind, one.sequence.key, one.known.groups))
        if passed:
            self.history.forget(passed)

    def _draft(self, plan: list[Work], choices: list[_Choice], scheduler: Scheduler) -> list[Work]:
        """Asks the proposers and puts what they guess behind the plan's works."""
        wanted: dict[int, list[_Choice]] = {}
        for choice in choices:
            count = scheduler.look_ahead(plan[choice.at].sequence, choice.guesses)
            if count > 0:
                wanted.setdefault(choice.proposer, []).append(choice._replace(guesses=count))
        extended = list(plan)
        for number, mine in wanted.items():
            asked = [(plan[choice.at].sequence, choice.guesses) for choice in mine]
            drafts = self.proposers[number].propose(asked)
            for choice, draft in zip(mine, drafts, strict=True):
                sequence = plan[choice.at].sequence
                draft = _allowed(sequence, draft)
                if draft is not None:
                    self._kinds[sequence.key] = (number, choice.kind)
                    sequence.proposed += len(draft.ids)
                    extended[choice.at] = Work(sequence, 1 + len(draft.ids), draft)
        return sorted(extended, key=lambda work: work.count > 1)

    # ---- behind a step ---------------------------------------------------------------------------

    def settle(self, sequence: Sequence, draft: Draft, accepted: int) -> str:
        """So many guesses of a sequence are right, and its tokens are about to get them: who
        guessed."""
        guessed = len(draft.ids)
        number, kind = self._kinds.pop(sequence.key)
        proposer = self.proposers[number]
        proposer.settle(sequence, accepted)
        deep = guessed if draft.parents is None else max(draft.depths) + 1
        self.history.observe(kind, sequence.key, _groups(sequence), deep, accepted)
        return proposer.name

    def count(self, proposer: str, guessed: int, accepted: int) -> None:
        """So many guesses have become tokens of an answer: fewer than were right, where it ended
        among them."""
        counts = self.counts
        counts.drafts += 1
        counts.guessed += guessed
        counts.accepted += accepted
        for place in range(accepted):
            counts.accepted_at[place] += 1
        for what, tokens in (("accepted", accepted), ("rejected", guessed - accepted)):
            label = (proposer, what)
            counts.by_proposer[label] = counts.by_proposer.get(label, 0) + tokens

    def end(self, sequence: Sequence) -> None:
        """A sequence has ended, or was cancelled."""
        self._kinds.pop(sequence.key, None)
        self.history.end(sequence.key)
        known = self._known.pop(sequence.key, None)
        if known is not None:
            self.lengths.observe(known.groups[-1], sequence.answer_tokens)
        for proposer in self.proposers:
            proposer.end(sequence)


class _Offered(NamedTuple):
    offer: Offer
    choice: _Choice


class _Step(NamedTuple):
    """What a step of guesses is weighed by: it has to make its decodes faster, and a prompt's chunk
    beside them is work of its own that guesses only hold up."""

    decodes: StepSize
    whole: StepSize
    context: int  # of a sequence that guesses
    beside_s: float  # of the engine's own, where something is guessed

    def seconds(self, costs: StepCosts | None) -> Iterator[float]:
        """Of the decodes with no guess, and with 1, 2, ..."""
        if costs is None:
            steps_s: Iterator[float] = (
                _TOKEN_SHARE * (self.decodes.tokens + more + 9) for more in count()
            )
            less_s = beside_s = 0.0
        else:
            steps_s = costs.growing(self.whole, self.context)
            less_s = 0.0
            if self.whole is not self.decodes:
                less_s = costs.estimate(self.whole) - costs.estimate(self.decodes)
            beside_s = self.beside_s
        yield next(steps_s) - less_s
        for seconds in steps_s:
            yield seconds - less_s + beside_s


def _better(free: list[_Offered], priced: list[_Offered]) -> list[_Offered]:
    """For each sequence the offer with the better chance."""
    best = {one.choice.at: one for one in free}
    for one in priced:
        other = best.get(one.choice.at)
        if other is None or one.offer.rate > other.offer.rate:
            best[one.choice.at] = one
    return list(best.values())


def _groups(sequence: Sequence) -> tuple[Hashable, ...]:
    service = sequence.service
    tier = (service.tier, sequence.adapter)
    return (tier, (*tier, service.route)) if service.route else (tier,)


def _allowed(sequence: Sequence, draft: Draft | None) -> Draft | None:
    """A draft as far as the answer and its grammar go; None where nothing is left."""
    draft = _up_to_the_end(sequence, draft)
    if sequence.adjustment is None:
        return draft
    sequence.adjustment.keep(0)  # a proposer may have looked ahead
    if draft is None or draft.forced is not None:
        return draft
    if draft.parents is not None:  # masks follow one chain: the first branch
        chain = takewhile(lambda one: one[0] == one[1] + 1, enumerate(draft.parents))
        draft = Draft(draft.ids[: sum(1 for _ in chain)])
    count = sequence.adjustment.allows(draft.ids)
    if count == len(draft.ids):
        return draft
    probs = None if draft.probs is None else draft.probs[:count]
    return Draft(draft.ids[:count], probs) if count else None


def _up_to_the_end(sequence: Sequence, draft: Draft | None) -> Draft | None:
    """A chain up to a guess that ends the answer: nothing behind it can be right. Text that is
    looked up goes on with the next turn of a conversation."""
    if draft is None or draft.parents is not None or draft.forced is not None:
        return draft
    end = next((at for at, one in enumerate(draft.ids, start=1) if one in sequence.ends), None)
    if end is None or end == len(draft.ids):
        return draft
    return Draft(draft.ids[:end], None if draft.probs is None else draft.probs[:end])
