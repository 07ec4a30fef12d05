"""What all requests of this gateway came to, by tier, model and arm: for its page of metrics.

Counts what account.py says of each request at its end. Labels are bounded: tiers and arms are the
policy's, a model is one that a replica has named, and beyond MODELS_MAX they are `other`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.histogram import DURATION_S, FIRST_TOKEN_S, GAP_S, TOKEN_S, Histogram
from gateway.token_ledger import INVARIANTS, STAGES, enter, violated

if TYPE_CHECKING:
    from gateway.account import Account
    from telemetry import Outcome

log = logging.getLogger("headgate.gateway")

MODELS_MAX = 64
REPLICAS_MAX = 256
OTHER = "other"
# Failures that a promise does not speak of: the client's own doing, and its going.
NOT_JUDGED = ("refused", "cancelled")


class Meters:
    """Totals since the process began. Outlives policies."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.token_s = Histogram(TOKEN_S)
        self.duration_s = Histogram(DURATION_S)
        self.gap_s = Histogram(GAP_S)
        self.recv_queue_s = Histogram(GAP_S)
        self.requests: Counter[tuple[str, ...]] = Counter()  # tier, model, arm, outcome
        self.goodput: Counter[tuple[str, ...]] = Counter()  # tier, arm, met
        self.replicas: dict[str, Counter[str]] = {}  # by URL: outcomes
        self.stalls: Counter[tuple[str, ...]] = Counter()  # tier
        self.bytes_in_vain = 0
        self.stages = dict.fromkeys(STAGES, 0)
        self.violations = dict.fromkeys(INVARIANTS, 0)
        self.checked = 0  # requests with an entry in the ledger
        self._models: set[str] = set()

    def ended(self, account: Account, outcome: Outcome, now: float) -> None:
        """One request by one arm."""
        tier = account.service.tier if account.service is not None else ""
        labels = (tier, self.model(account.call.model, account.served), account.arm)
        self.requests[*labels, outcome] += 1
        if account.replica:
            self._of_replica(account.replica, outcome)
        pulse, trace = account.reply.pulse, account.trace
        self.recv_queue_s.observe(labels, account.read - account.began, trace)
        self.bytes_in_vain += pulse.bytes_in_vain
        ttft_s = tpot_s = None
        if pulse.first_at is not None:
            ttft_s = pulse.first_at - account.began
            self.first_token_s.observe(labels, ttft_s, trace)
            self.stalls[(tier,)] += pulse.stalls()
            if pulse.longest_s is not None:
                self.gap_s.observe(labels, pulse.longest_s, trace)
        usage = account.usage
        if outcome == "ok":
            self.duration_s.observe(labels, now - account.began, trace)
            if usage is not None and ttft_s is not None and usage.answer_tokens > 1:
                assert pulse.first_at is not None
                tpot_s = (pulse.last_at - pulse.first_at) / (usage.answer_tokens - 1)
                self.token_s.observe(labels, tpot_s, trace)
            self._enter(account)
        self._judge(account, outcome, ttft_s, tpot_s)

    def _judge(
        self, account: Account, outcome: Outcome, ttft_s: float | None, tpot_s: float | None
    ) -> None:
        """Whether it kept what its tier promises."""
        service = account.service
        if service is None or account.rescued or outcome in NOT_JUDGED:
            return
        met = outcome == "ok"
        for took_s, target_ms in ((ttft_s, service.ttft_ms), (tpot_s, service.tpot_ms)):
            if took_s is not None and target_ms is not None:
                met = met and took_s <= target_ms / 1000
        self.goodput[service.tier, account.arm, "true" if met else "false"] += 1

    def _enter(self, account: Account) -> None:
        """Its line in the token ledger, checked."""
        entry = account.entry()
        self.checked += 1
        enter(self.stages, entry)
        if wrong := violated(entry):
            for name in wrong:
                self.violations[name] += 1
            log.warning(
                "request %s: its tokens do not add up (%s): %s",
                account.reply.request_id, ", ".join(wrong), entry,
            )  # fmt: skip

    def model(self, name: str, served: Callable[[], bool]) -> str:
        """The label of a model that was asked for; `served`: whether any replica names it."""
        if name in self._models:
            return name
        if len(self._models) < MODELS_MAX and served():
            self._models.add(name)
            return name
        return OTHER

    def _of_replica(self, url: str, outcome: Outcome) -> None:
        """Replicas come and go where they are discovered; the longest known ones are forgotten."""
        if url not in self.replicas:
            self.replicas[url] = Counter()
            if len(self.replicas) > REPLICAS_MAX:
                self.replicas.pop(next(iter(self.replicas)))
        self.replicas[url][outcome] += 1
