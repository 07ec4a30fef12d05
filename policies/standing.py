"""One optimization of a policy: whether it may be served, and why not.

It may with a live pass for exactly what would be served: baseline, candidate and specification as
they are now, as far as `effects.py` says that it matters to what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from policies.effects import Spoiled, spoiled
from policies.gating import Gate
from policies.hypothesis import Hypothesis
from policies.leaves import Unknown
from policies.ledger import CONCLUSIVE, Decision, Ledger, LedgerError, Reading
from policies.side import Side, changed

State = Literal["on", "off", "stale", "quarantined"]
# In place of a leaf: time alone made a verdict stale, or traffic that is another now.
AGE, TRAFFIC = "age", "traffic"


@dataclass(frozen=True, slots=True)
class Standing:
    """One optimization. It is served if `enabled`: with a live pass, or where the policy does not
    insist on one. `leaves` changed since the verdict, and spoiled these findings of it."""

    hypothesis: str
    file: str
    kind_of_change: str
    knobs: tuple[str, ...]
    state: State = "off"
    enabled: bool = False
    why: str = ""
    verdict: str = ""  # pass, fail, ...: of the verdict that was looked at
    evidence: str = ""
    made_at: float | None = None
    expires_at: float | None = None
    leaves: tuple[str, ...] = ()
    spoiled: tuple[Spoiled, ...] = ()
    baseline: str = ""  # roots as they are now
    candidate: str = ""
    spec: str = ""

    def payload(self) -> dict[str, Any]:
        """As /v1/fingerprint and `headgate gate status --json` tell it."""
        return {
            "hypothesis": self.hypothesis,
            "file": self.file,
            "kind_of_change": self.kind_of_change,
            "knobs": list(self.knobs),
            "state": self.state,
            "enabled": self.enabled,
            "why": self.why,
            "verdict": self.verdict or None,
            "evidence": self.evidence or None,
            "made_at": self.made_at,
            "expires_at": self.expires_at,
            "stale_leaves": list(self.leaves),
            "stale_findings": [
                {"finding": one.finding, "leaf": one.leaf, "effect": one.effect}
                for one in self.spoiled
            ],
            "baseline": self.baseline or None,
            "candidate": self.candidate or None,
            "spec": self.spec or None,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """May a policy become what the hypothesis in `file` proposes?"""

    file: Path
    hypothesis: Hypothesis
    sides: Callable[[], tuple[Side, Side, Side]]  # baseline, candidate, spec; may raise Unknown
    gate: Gate
    ledger: Ledger
    reading: Reading  # of the ledger
    now: float

    @property
    def again(self) -> str:
        return f"headgate gate run {self.file}"


@dataclass(frozen=True, slots=True)
class _Compared:
    """A verdict beside what it would be about now."""

    verdict: Decision
    spoiled: tuple[Spoiled, ...]


def judged(asked: Question) -> Standing:
    """The answer, by the ledger and by how far the policy insists on it."""
    hypothesis, enforce = asked.hypothesis, asked.gate.enforce
    one = Standing(
        hypothesis.name,
        str(asked.file),
        hypothesis.kind_of_change,
        tuple(hypothesis.candidate.patch),
    )
    if enforce == "off":
        return replace(one, state="on", enabled=True, why="gate.enforce is off: nobody asked")
    one = _by_verdicts(one, asked)
    if enforce == "warn" and one.state in ("off", "stale"):
        return replace(one, enabled=one.verdict not in ("fail", "no_benefit"))
    return one


def _by_verdicts(one: Standing, asked: Question) -> Standing:
    named = [found for found in asked.reading.verdicts() if found.hypothesis == one.hypothesis]
    spoken = [verdict for verdict in named if verdict.decision in CONCLUSIVE]
    if not named:
        return replace(one, why=f"there is no verdict: {asked.again}")
    if not spoken:
        last = named[-1]
        reason = f" ({last.reason})" if last.reason else ""
        why = f"its verdict is {last.decision}{reason}: {asked.again}"
        return replace(_seen(one, last), why=why)
    spoken.sort(key=lambda verdict: verdict.at, reverse=True)
    newest = spoken[0]
    try:
        sides = asked.sides()
        baseline, candidate, spec = (side.root for side in sides)
        one = replace(one, baseline=baseline, candidate=candidate, spec=spec)
        compared = []
        for verdict in spoken:  # one that cannot be read may have said that it failed
            compared.append(found := _compare(asked.ledger, verdict, sides))
            if not found.spoiled:
                return _of_what_is_served(_seen(one, verdict), verdict, asked)
    except (Unknown, LedgerError) as error:
        state: State = "stale" if newest.decision == "pass" else "off"
        return replace(_seen(one, newest), state=state, why=str(error))
    nearest = next(found for found in compared if found.verdict is newest)
    return _of_something_else(_seen(one, newest), nearest, asked)


def _seen(one: Standing, verdict: Decision) -> Standing:
    return replace(
        one,
        verdict=verdict.decision,
        evidence=verdict.evidence,
        made_at=verdict.at,
        expires_at=verdict.expires_at,
    )


def _compare(ledger: Ledger, verdict: Decision, sides: Iterable[Side]) -> _Compared:
    """What of a verdict the leaves spoil that changed since. Raises LedgerError."""
    payload = ledger.verdict(verdict.evidence)
    try:
        if payload["decision"] != verdict.decision:
            raise LedgerError(f"verdict {verdict.evidence} is {payload['decision']}, not as listed")
        then = [_side(payload, name) for name in ("baseline", "candidate", "spec")]
        pairs = zip(then, sides, strict=True)
        leaves = sorted({leaf for old, new in pairs for leaf in changed(old, new)})
        return _Compared(verdict, spoiled(payload, leaves))
    except (KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"verdict {verdict.evidence} cannot be read: {error!r}") from None


def _side(payload: Mapping[str, Any], name: str) -> Side:
    return Side(payload[name]["root"], payload[name]["leaves"])


def _of_what_is_served(one: Standing, verdict: Decision, asked: Question) -> Standing:
    """The verdict speaks of exactly this."""
    if verdict.decision != "pass":
        return replace(one, why=f"its verdict is {verdict.decision}")
    if (held := asked.reading.quarantine_of(verdict, one.candidate)) is not None:
        return _quarantined(one, held)
    ages = (asked.gate.max_age, asked.hypothesis.validity.max_age)
    ends = [verdict.at + age for age in ages if age is not None]
    if verdict.expires_at is not None:
        ends.append(verdict.expires_at)
    one = replace(one, expires_at=min(ends))
    if asked.now >= min(ends):
        days = (asked.now - verdict.at) / 86400
        why = f"its verdict is {days:.0f} days old: {asked.again}"
        return replace(one, state="stale", leaves=(AGE,), why=why)
    drift = asked.reading.drift_since(verdict)
    if drift is not None and asked.hypothesis.validity.on_traffic_drift == "stale":
        why = f"{drift.reason}: {asked.again}"
        return replace(one, state="stale", leaves=(TRAFFIC,), why=why)
    return replace(one, state="on", enabled=True, why=drift.reason if drift else "")


def _of_something_else(one: Standing, nearest: _Compared, asked: Question) -> Standing:
    """No verdict speaks of this; the nearest is of what it was before some leaves changed."""
    verdict = nearest.verdict
    leaves = tuple(sorted({spoil.leaf for spoil in nearest.spoiled}))
    what = ", ".join(leaves) + (" has changed" if len(leaves) == 1 else " have changed")
    one = replace(one, leaves=leaves, spoiled=nearest.spoiled)
    if verdict.decision != "pass":
        why = f"its verdict is {verdict.decision}; since then {what}: {asked.again}"
        return replace(one, why=why)
    if (held := asked.reading.quarantine_of(verdict, one.candidate)) is not None:
        return _quarantined(one, held)
    return replace(one, state="stale", why=f"{what} since its verdict: {asked.again}")


def _quarantined(one: Standing, held: Decision) -> Standing:
    why = f"{held.reason or 'it was rolled back'}: it needs a verdict that is newer"
    return replace(one, state="quarantined", why=why)
