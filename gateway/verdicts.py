"""What the ledgers say of a candidate: whether it may be live here, and for others who ask.

Reads the ledgers that the policy goes by, anew each time: a quarantine counts from the moment in
which it is written. Others are Argo Rollouts, which reads a result, and Flagger, which reads a
status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway import problems
from gateway.edge import Live
from policies.chain import ledgers
from policies.enabling import Gated
from policies.ledger import Decision, Ledger, LedgerError, Reading
from policies.side import SHORT_DIGITS
from runtime.wire import Problem

SHORT = "fp_"
SHORTEST = 8  # digits by which a candidate is known


class Verdicts:
    """The ledgers of a gateway that serves by a policy file; without one there are none."""

    def __init__(self, live: Live, clock: Callable[[], float] = time.time) -> None:
        self._live = live
        self._clock = clock

    async def refuse(self, roots: Mapping[str, str]) -> None:
        """Raises Problem 403 where the policy asks for a live pass, and none speaks for these."""
        found = self._live.gated
        if found is None or found.deployment.gate.enforce != "strict":
            return
        baseline, candidate, spec = (
            roots.get(name, "") for name in ("baseline", "candidate", "spec")
        )
        now = self._clock()
        readings = await self._readings()
        if not any(one.live(baseline, candidate, spec, now) for one in readings):
            raise problems.no_live_pass([str(one.folder) for one in _ledgers(found)])

    async def _readings(self) -> list[Reading]:
        """Raises Problem 503 for a ledger that cannot be read."""
        found = self._live.gated
        if found is None:
            return []
        try:
            return await asyncio.to_thread(lambda: [one.read() for one in _ledgers(found)])
        except LedgerError as error:
            raise problems.ledger_unreadable(str(error)) from None

    async def result(self, name: str) -> dict[str, Any]:
        """`pass`, `fail` or `inconclusive` of a candidate, by its root, its short form, or as many
        digits of it as tell it apart."""
        digits = name.removeprefix(SHORT)
        known = len(digits) >= SHORTEST and digits.isalnum()
        readings = await self._readings() if known else []
        for reading in readings:
            of = [one for one in reading.verdicts() if one.candidate.startswith(digits)]
            if of:
                return self._told(reading, max(of, key=lambda one: one.at))
        return {"fingerprint": name, "result": "inconclusive", "reason": "no verdict is known"}

    def _told(self, reading: Reading, last: Decision) -> dict[str, Any]:
        now = self._clock()
        held = reading.quarantine_of(last)
        result, reason = "inconclusive", last.reason or last.decision
        if held is not None:
            result, reason = "fail", f"quarantined: {held.reason}"
        elif last.decision == "fail":
            result = "fail"
        elif reading.live(last.baseline, last.candidate, last.spec, now) is not None:
            result, reason = "pass", ""
        elif last.expired(now):
            reason = "its pass has expired"
        return {
            "fingerprint": SHORT + last.candidate[:SHORT_DIGITS],
            "hypothesis": last.hypothesis,
            "result": result,
            "reason": reason,
            "made_at": last.at,
            "evidence": last.evidence,
        }


def _ledgers(found: Gated) -> list[Ledger]:

    return ledgers(found)


def named_in(payload: Mapping[str, Any]) -> str:
    """The candidate that a webhook of Flagger's is about: `metadata.fingerprint`. Problem 400."""
    metadata = payload.get("metadata")
    name = metadata.get("fingerprint") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise Problem(
            400,
            "the webhook names no candidate: give `metadata.fingerprint` in the canary's webhook",
            param="metadata.fingerprint",
            code="missing_required_parameter",
        )
    return name
