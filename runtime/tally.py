"""What the engine's thread counts while it runs: plain numbers, a few additions a step.

Knows sequences and steps; knows no names of metrics and no exposition. Anybody may read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

from runtime.distribution import (
    CHOICES,
    FIRST_TOKEN_S,
    PREEMPTIONS,
    REQUEST_S,
    STEP_TOKENS,
    TOKEN_S,
    Distribution,
    tokens_up_to,
)
from runtime.token_ledger import INVARIANTS, STAGES, Entry, violated

if TYPE_CHECKING:
    from runtime.account import StepRecord
    from runtime.sequence import Sequence

log = logging.getLogger(__name__)

# How an answer can end: by itself, by its client's leaving, by a failure, by its deadline.
FINISHED = ("stop", "length", "abort", "error", "deadline")
_WHOLE = ("stop", "length")
ANSWERED = ("/v1/chat/completions", "/v1/completions")


class Tally:
    """What the engine's thread counts: one Listener, a few additions a step."""

    def __init__(self, context_tokens: int) -> None:
        lengths = tokens_up_to(context_tokens)
        self.first_token_s = Distribution(FIRST_TOKEN_S)
        self.token_s = Distribution(TOKEN_S)
        self.mean_token_s = Distribution(TOKEN_S)
        self.whole_s = Distribution(REQUEST_S)
        self.queue_s = Distribution(REQUEST_S)
        self.run_s = Distribution(REQUEST_S)
        self.prefill_s = Distribution(REQUEST_S)
        self.decode_s = Distribution(REQUEST_S)
        self.prompt_tokens = Distribution(lengths)
        self.computed_tokens = Distribution(lengths)
        self.answer_tokens = Distribution(lengths)
        self.max_tokens = Distribution(lengths)
        self.choices = Distribution(CHOICES)
        self.preemptions = Distribution(PREEMPTIONS)
        self.step_tokens = Distribution(STEP_TOKENS)
        self.step_s = Distribution(TOKEN_S)
        self.forward_s = 0.0
        self.sampled_tokens = 0
        self.finished = dict.fromkeys(FINISHED, 0)
        self.abandoned = dict.fromkeys((one for one in FINISHED if one not in _WHOLE), 0)
        self.stages = dict.fromkeys(STAGES, 0)
        self.checked = 0
        self.violations = dict.fromkeys(INVARIANTS, 0)
        self.http: dict[tuple[str, ...], int] = {  # path, method, class of status
            (path, "POST", kind): 0 for path in ANSWERED for kind in ("2xx", "4xx", "5xx")
        }
        self.http_s: dict[tuple[str, ...], Distribution] = {
            (path,): Distribution(REQUEST_S) for path in ANSWERED
        }
        self.targets: dict[tuple[str, ...], int] = {
            (name, met): 0 for name in ("ttft", "tpot") for met in ("true", "false")
        }

    # ---- the engine's thread ---------------------------------------------------------------------

    def sampled(self, sequences: Many[Sequence], now: float) -> None:
        self.sampled_tokens += len(sequences)
        gaps = []
        for one in sequences:
            last = one.times.last_token
            if last is None:
                self._first(one, now)
            else:
                gaps.append(now - last)
        # Answers that run together got their last token in the same step.
        for gap, times in Counter(gaps).items():
            self.token_s.observe(gap, times)

    def _first(self, sequence: Sequence, now: float) -> None:
        taken_s = now - sequence.times.arrived
        self.first_token_s.observe(taken_s)
        self._judge("ttft", taken_s, sequence.service.ttft_s)

    def guessed(self, guessed: int, accepted: int, said: int) -> None:  # noqa: ARG002 - counted by `Speculation`
        self.sampled_tokens += said - 1

    def stepped(self, record: StepRecord) -> None:
        self.step_tokens.observe(record.size.tokens)
        self.step_s.observe(record.seconds)
        self.forward_s += record.forward_s

    def ended(self, sequence: Sequence, reason: str, now: float) -> None:
        """Times and sizes are those of answers that came whole."""
        self.finished[reason] += 1
        times = sequence.times
        if reason not in _WHOLE:
            self.abandoned[reason] += sequence.answer_tokens
            return
        if times.admitted is None:
            return
        self._enter(sequence)
        first = now if times.first_token is None else times.first_token
        last = first if times.last_token is None else times.last_token
        self.whole_s.observe(now - times.arrived)
        self.queue_s.observe(times.admitted - times.arrived)
        self.run_s.observe(last - times.admitted)
        self.prefill_s.observe(first - times.admitted)
        self.decode_s.observe(last - first)
        answer = sequence.answer_tokens
        if answer > 1:
            mean_s = (last - first) / (answer - 1)
            self.mean_token_s.observe(mean_s)
            self._judge("tpot", mean_s, sequence.service.tpot_s)
        self.prompt_tokens.observe(sequence.prompt_tokens)
        self.computed_tokens.observe(sequence.prompt_tokens - sequence.cached)
        self.answer_tokens.observe(answer)
        self.max_tokens.observe(sequence.sampling.max_tokens)
        self.preemptions.observe(sequence.preemptions)

    def _enter(self, sequence: Sequence) -> None:
        """Its line in the token ledger, checked."""
        entry = Entry(
            sequence.counts,
            templated=sequence.prompt_tokens,
            cached=sequence.cached,
            said=sequence.answer_tokens,
            allowed=sequence.sampling.max_tokens,
            proposed=sequence.proposed,
            preempted=sequence.preemptions > 0,
        )
        self.checked += 1
        for stage, tokens in entry.stages().items():
            self.stages[stage] += tokens
        if wrong := violated(entry):
            for name in wrong:
                self.violations[name] += 1
            what = sequence.service.request_id or sequence.key
            log.warning(
                "request %s: its tokens do not add up (%s): %s", what, ", ".join(wrong), entry
            )

    def _judge(self, name: str, taken_s: float, target_s: float | None) -> None:
        if target_s is not None:
            self.targets[name, "true" if taken_s <= target_s else "false"] += 1

    # ---- the event loop's thread -----------------------------------------------------------------

    def asked(self, choices: int) -> None:
        """A request was taken that wants so many answers to each of its prompts."""
        self.choices.observe(choices)

    def answered(self, path: str, status: int, took_s: float) -> None:
        """A request for answers has got its own, or none; a stream that ended in an error did well
        as far as HTTP goes."""
        self.http[path, "POST", f"{status // 100}xx"] += 1
        self.http_s[(path,)].observe(took_s)
