"""What is being changed: optimizations and their verdicts, the rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.metrics.family import Family, Reading, Values

if TYPE_CHECKING:
    from policies.standing import Standing

STATES = ("on", "off", "stale", "quarantined")  # of an optimization
STAGES = ("live", "suspended", "lapsed", "ended")  # of a rollout


def _optimizations(r: Reading) -> Values:
    return {
        (one.hypothesis, state): float(one.state == state)
        for one in r.standings
        for state in STATES
    }


def _standing(read: Callable[[Standing, float], float | None]) -> Callable[[Reading], Values]:
    """A number of each optimization of the policy."""

    def values(r: Reading) -> Values:
        found = ((one.hypothesis, read(one, r.now)) for one in r.standings)
        return {(name,): value for name, value in found if value is not None}

    return values


def _age_s(one: Standing, now: float) -> float | None:
    return None if one.made_at is None else now - one.made_at


def _left_s(one: Standing, now: float) -> float | None:
    return None if one.expires_at is None else one.expires_at - now


def _rollout(name: str) -> Callable[[Reading], Values]:
    """A number of the rollout, where there is one."""
    return lambda r: {} if r.rollout is None else {(r.rollout["name"],): r.rollout[name]}


def _stage(r: Reading) -> Values:
    if r.rollout is None:
        return {}
    at = "live"
    if r.rollout["ended"]:
        at = "ended"
    elif not r.rollout["lease_s"]:
        at = "lapsed"
    elif r.rollout["suspended"]:
        at = "suspended"
    return {(r.rollout["name"], stage): float(stage == at) for stage in STAGES}


GAUGES = (
    Family(
        "headgate_optimization_state",
        "1 for the state that an optimization of the policy is in, 0 for the others.",
        _optimizations,
        ("name", "state"),
    ),
    Family(
        "headgate_optimization_enabled",
        "1 while it is served.",
        _standing(lambda one, _: float(one.enabled)),
        ("name",),
    ),
    Family(
        "headgate_verdict_age_seconds",
        "Since the verdict that it goes by was made; absent without one.",
        _standing(_age_s),
        ("name",),
    ),
    Family(
        "headgate_verdict_valid_seconds",
        "Until that verdict is too old; negative afterwards.",
        _standing(_left_s),
        ("name",),
    ),
    Family(
        "headgate_rollout_share",
        "Share of sessions that the candidate answers; absent without a rollout.",
        _rollout("share"),
        ("name",),
    ),
    Family(
        "headgate_rollout_shadow_share",
        "Share of sessions that it answers for nobody.",
        _rollout("shadow"),
        ("name",),
    ),
    Family(
        "headgate_rollout_state",
        "1 for the state that the rollout is in, 0 for the others.",
        _stage,
        ("name", "state"),
    ),
)
