"""Which sequences of a step guess ahead, how far and by whom; and what became of it.

Knows plans, costs and proposers behind their protocol; knows no model and no logits. Where nothing
is guessed a step costs one comparison more. Budgets are `spec_decode.adapt`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.costs import StepCosts, StepSize
from runtime.scheduler import Scheduler, Work, step_size
from runtime.scoring import scores_prompt
from runtime.sequence import Sequence
from spec_decode.adapt import Budget, History, Kind, Offer, Rest, best_budget
from spec_decode.draft import GUESSES_MAX, Draft, Proposer

# A step without a table of costs: what a token more costs, of what the first one does.
_TOKEN_SHARE = 0.1


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


class _Choice(NamedTuple):
    """So many guesses for the sequence of one work of the plan, by one proposer."""

    at: int
    proposer: int
    guesses: int
    kind: Kind


@dataclass(slots=True)
class Counts:
    """What was guessed so far; `accepted_at` counts the accepted ones by their place."""

    drafts: int = 0
    guessed: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * GUESSES_MAX)
    by_proposer: dict[tuple[str, ...], int] = field(default_factory=dict)
    rested: int = 0  # steps in which nothing was looked at
    seconds: float = 0.0  # of the engine's thread


@dataclass(slots=True, eq=False)
class Speculation:
    """Guesses for the engine. `span_s` is what a span of several tokens costs beside its tokens."""

    proposers: Many[Proposer]
    modes: Modes
    span_s: float = 0.0
    counts: Counts = field(default_factory=Counts)
    history: History = field(default_factory=History)
    _rest: Rest = field(default_factory=Rest)
    _kinds: dict[int, tuple[int, Kind]] = field(default_factory=dict)  # of drafts under way

    # ---- before a step ---------------------------------------------------------------------------

    def extend(self, plan: list[Work], scheduler: Scheduler) -> list[Work]:
        """The plan with guesses behind sequences that catch up, those of one token first."""
        always = self.modes.usual.proposer == "auto" and not (self.modes.tiers or self.modes.models)
        if always and self._rest.rests(len(plan)):
            self.counts.rested += 1
            return plan
        ready = [at for at, work in enumerate(plan) if _may_guess(work)]
        room = min(
            scheduler.step_tokens - sum(work.count for work in plan),
            scheduler.scored_rows - len(plan),
        )
        if not ready or room <= 0:
            return plan
        choices = self._static(plan, ready)
        room -= sum(choice.guesses for choice in choices)
        automatic = [at for at in ready if self.modes.of(plan[at].sequence).proposer == "auto"]
        if automatic and room > 0:
            choices += self._adaptive(plan, automatic, scheduler.costs, room)
        return self._draft(plan, choices, scheduler) if choices else plan

    def _static(self, plan: list[Work], ready: list[int]) -> list[_Choice]:
        """Guesses of those whose policy names a proposer, as many as it says."""
        choices = []
        for at in ready:
            sequence = plan[at].sequence
            mode = self.modes.of(sequence)
            for number, proposer in enumerate(self.proposers):
                if proposer.name == mode.proposer:
                    outlook = proposer.outlook(sequence, _most(sequence, mode))
                    if outlook is not None and outlook.most > 0:
                        kind = (proposer.name, outlook.trust)
                        choices.append(_Choice(at, number, outlook.most, kind))
        return choices

    def _adaptive(
        self, plan: list[Work], ready: list[int], costs: StepCosts | None, room: int
    ) -> list[_Choice]:
        """Guesses as far as they make tokens come faster."""
        free, priced = self._offers(plan, ready)
        step_s = _StepSeconds(plan, ready, costs, self.span_s)
        answers = sum(work.catches_up for work in plan)
        best, chosen = self._best(free, answers, step_s, room)
        if priced:
            other, mixed = self._best(_better(free, priced), answers, step_s, room)
            if other.speed > best.speed:
                best, chosen = other, mixed
        gain = best.speed * step_s(0) / answers
        choices = [
            one.choice._replace(guesses=count)
            for one, count in zip(chosen, best.counts, strict=True)
            if count
        ]
        if self._rest.judge(gain, len(plan)) and choices:
            taken = {(choice.at, choice.proposer) for choice in choices}
            self._pass_over(plan, [*free, *priced], taken)
            return choices
        self._pass_over(plan, [*free, *priced], set())
        return []

    def _offers(self, plan: list[Work], ready: list[int]) -> tuple[list[_Offered], list[_Offered]]:
        """What could be guessed for nothing, one offer a sequence, and what at a price."""
        free: list[_Offered] = []
        priced: list[_Offered] = []
        for at in ready:
            sequence = plan[at].sequence
            most = _most(sequence, self.modes.of(sequence))
            groups = _groups(sequence)
            best: _Offered | None = None
            for number, proposer in enumerate(self.proposers):
                outlook = proposer.outlook(sequence, most)
                if outlook is None or outlook.most < 1:
                    continue
                kind = (proposer.name, outlook.trust)
                rate = self.history.rate(kind, sequence.key, groups)
                costs = proposer.cost_s((1,), outlook.behind) > 0
                offer = Offer(outlook.most, rate, costs, outlook.behind)
                offered = _Offered(offer, _Choice(at, number, outlook.most, kind))
                if costs:
                    priced.append(offered)
                elif best is None or rate > best.offer.rate:
                    best = offered
            if best is not None:
                free.append(best)
        return free, priced

    def _best(
        self, offered: list[_Offered], answers: int, step_s: _StepSeconds, room: int
    ) -> tuple[Budget, list[_Offered]]:
        priced = next((one.choice.proposer for one in offered if one.offer.priced), 0)
        draft_s = self.proposers[priced].cost_s
        offers = [one.offer for one in offered]
        return best_budget(offers, answers, step_s, draft_s, room), offered

    def _pass_over(
        self, plan: list[Work], offered: list[_Offered], taken: set[tuple[int, int]]
    ) -> None:
        passed = []
        for one in offered:
            if (one.choice.at, one.choice.proposer) not in taken:
                sequence = plan[one.choice.at].sequence
                passed.append((one.choice.kind, sequence.key, _groups(sequence)))
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
                    extended[choice.at] = Work(sequence, 1 + len(draft.ids), draft)
        return sorted(extended, key=lambda work: work.count > 1)

    # ---- behind a step ---------------------------------------------------------------------------

    def settle(self, sequence: Sequence, guessed: int, accepted: int) -> None:
        """So many guesses of a sequence are right; its tokens are about to get them."""
        number, kind = self._kinds.pop(sequence.key)
        proposer = self.proposers[number]
        proposer.settle(sequence, accepted)
        self.history.observe(kind, sequence.key, _groups(sequence), guessed, accepted)
        counts = self.counts
        counts.drafts += 1
        counts.guessed += guessed
        counts.accepted += accepted
        for place in range(accepted):
            counts.accepted_at[place] += 1
        for what, tokens in (("accepted", accepted), ("rejected", guessed - accepted)):
            label = (proposer.name, what)
            counts.by_proposer[label] = counts.by_proposer.get(label, 0) + tokens

    def end(self, sequence: Sequence) -> None:
        """A sequence has ended, or was cancelled."""
        self._kinds.pop(sequence.key, None)
        self.history.end(sequence.key)
        for proposer in self.proposers:
            proposer.end(sequence)


class _Offered(NamedTuple):
    offer: Offer
    choice: _Choice


class _StepSeconds:
    """Seconds of a plan's step with so many guesses beside it."""

    def __init__(
        self, plan: list[Work], ready: list[int], costs: StepCosts | None, span_s: float
    ) -> None:
        self._size = step_size(plan)
        self._costs = costs
        self._span_s = span_s
        self._spans = len(ready)
        self._context = sum(len(plan[at].sequence.tokens) for at in ready) // len(ready)

    def __call__(self, guesses: int) -> float:
        size = self._size
        if self._costs is None:
            return 1.0 + _TOKEN_SHARE * (size.tokens + guesses - 1)
        more = StepSize(
            size.tokens + guesses,
            size.decode_context + guesses * self._context,
            size.chunk_pairs,
        )
        return self._costs.estimate(more) + self._span_s * min(guesses, self._spans)


def _better(free: list[_Offered], priced: list[_Offered]) -> list[_Offered]:
    """For each sequence the offer with the better chance."""
    best = {one.choice.at: one for one in free}
    for one in priced:
        other = best.get(one.choice.at)
        if other is None or one.offer.rate > other.offer.rate:
            best[one.choice.at] = one
    return list(best.values())


def _may_guess(work: Work) -> bool:
    """True for the next token of an answer, with room behind it."""
    sequence = work.sequence
    return work.count == 1 and work.catches_up and not scores_prompt(sequence)


def _most(sequence: Sequence, mode: Mode) -> int:
    """Guesses that an answer has use for: the last token of all need not be guessed."""
    return min(mode.most, sequence.sampling.max_tokens - sequence.answer_tokens - 1)


def _groups(sequence: Sequence) -> tuple[Hashable, ...]:
    service = sequence.service
    tier = (service.tier, sequence.adapter)
    return (tier, (*tier, service.route)) if service.route else (tier,)


def _allowed(sequence: Sequence, draft: Draft | None) -> Draft | None:
    """A draft as far as the answer's grammar lets it come; None where nothing is left."""
    if sequence.adjustment is None:
        return draft
    sequence.adjustment.keep(0)  # a proposer may have looked ahead
    if draft is None or draft.forced is not None:
        return draft
    count = sequence.adjustment.allows(draft.ids)
    if count == len(draft.ids):
        return draft
    probs = None if draft.probs is None else draft.probs[:count]
    return Draft(draft.ids[:count], probs) if count else None
