"""How a request ended, in one word, as people look for it: of a list, and of what a tenant had.

Pure. What is judged here is what its client saw; a share of `ok` among JUDGED is of kept promises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from telemetry.genai import LEAVES

if TYPE_CHECKING:
    from gateway.trail import Hop, Trail

Fate = Literal["ok", "late", "failed", "shed", "limited", "refused", "cancelled"]
FATES: tuple[Fate, ...] = ("ok", "late", "failed", "shed", "limited", "refused", "cancelled")
MISSED: tuple[Fate, ...] = ("late", "failed", "shed")  # what a promise was made of, and not kept
JUDGED: tuple[Fate, ...] = ("ok", *MISSED)
SHED = ("overloaded", "deadline_exceeded")  # codes of the queue's refusals
LIMITED = ("rate_limit_exceeded", "insufficient_quota")  # of a tenant's limits

# How one request to one replica went: it answered; it refused what was asked (4xx); it failed, in
# the middle of an answer, too; it was left for another one since it was late; whoever asked left.
Tried = Literal["ok", "refused", "failed", "late", "left"]
TRIED: tuple[Tried, ...] = ("ok", "refused", "failed", "late", "left")


def tried_of(hop: Hop) -> Tried | None:
    """Of one that has ended; None for what never came there: its connection had been closed."""
    outcome = hop.outcome
    if hop.broke:
        return "failed"
    if outcome.isdigit():
        return "ok" if outcome < "400" else "refused" if outcome < "500" else "failed"
    if outcome == "stale":
        return None
    return "late" if outcome == "late" else "left" if outcome == "left" else "failed"


def fate_of(trail: Trail) -> Fate:
    """Of one that has ended."""
    status, error = trail.status, trail.error
    if error in (LEAVES, "stopped"):
        return "cancelled"
    if error in LIMITED:
        return "limited"
    if error in SHED:
        return "shed"
    if 400 <= status < 500:
        return "refused"
    if error or status >= 500:
        return "failed"
    return "late" if late(trail) else "ok"


def late(trail: Trail) -> bool:
    """Whether it missed a target of its tier."""
    service = trail.service
    if service is None or not trail.stream:  # what is no stream was promised nothing
        return False
    ttft_s, tpot_s = trail.ttft_s, trail.tpot_s
    if ttft_s is not None and service.ttft_ms is not None and 1000 * ttft_s > service.ttft_ms:
        return True
    return tpot_s is not None and service.tpot_ms is not None and 1000 * tpot_s > service.tpot_ms
