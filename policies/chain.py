"""Optimizations of a policy, one after the other: each judged on top of those before it.

Knows where hypotheses and ledgers lie; what lets one of them on, `standing.py` says.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from policies.devices import Devices, devices
from policies.enabling import Gated
from policies.hypothesis import Hypothesis
from policies.leaves import Binder, spec_side
from policies.ledger import Ledger, LedgerError, Reading
from policies.load import at_fields, load_hypothesis
from policies.patching import Configured, configured
from policies.problems import PolicyError
from policies.schema import Deployment
from policies.side import Side
from policies.standing import Question, Standing, judged

LEDGER = Path(".headgate", "ledger")
# What only a restart can change: an optimization of it stays as it began.
_FIXED = ("runtime.", "gateway.processes")


class Chain:
    """A policy to which one optimization after the other is added, if it may be served there."""

    def __init__(
        self,
        policy: Configured,
        now: float,
        told: Callable[[], Devices] = devices,
        serving: Gated | None = None,
    ) -> None:
        self.so_far = policy
        self.standings: list[Standing] = []
        self.readings: dict[Path, Reading] = {}  # by the ledger's folder
        self._policy = policy
        self._now = now
        self._serving = serving
        self._binder = Binder(policy.file, told)

    def add(self, path: Path, hypothesis: Hypothesis) -> None:
        """Raises PolicyError where its patch makes no policy."""
        before = self.so_far
        after = configured(before.file, before.data, path, "candidate", hypothesis.candidate)
        ledger = ledger_for(path, self._policy)
        unreadable = ""
        try:
            reading = self.readings.get(ledger.folder) or ledger.read()
            self.readings[ledger.folder] = reading
        except LedgerError as error:
            reading, unreadable = Reading(), str(error)

        def sides() -> tuple[Side, Side, Side]:
            side = self._binder.side
            return side(before.deployment), side(after.deployment), spec_side(path, hypothesis)

        gate = self._policy.deployment.gate
        one = judged(Question(path, hypothesis, sides, gate, ledger, reading, self._now))
        if unreadable and not one.enabled:
            one = replace(one, why=unreadable)
        if self._serving is not None:
            one = _held(one, self._serving)
        self.standings.append(one)
        self.so_far = after if one.enabled else before


def _held(one: Standing, serving: Gated) -> Standing:
    if not any(knob.startswith(_FIXED) for knob in one.knobs):
        return one
    known = {other.hypothesis: other.enabled for other in serving.standings}
    enabled = known.get(one.hypothesis, False)
    if enabled == one.enabled:
        return one
    until = "it is served until the next start" if enabled else "it is served from the next start"
    return replace(one, enabled=enabled, why=f"{one.why}; {until}" if one.why else until)


def hypotheses(file: Path, deployment: Deployment) -> Iterator[tuple[Path, Hypothesis]]:
    """Those that the policy names, with their files. Raises PolicyError."""
    names: set[str] = set()
    for at, one in enumerate(deployment.optimizations):
        path = file.parent / Path(one.hypothesis).expanduser()
        place = ("optimizations", at, "hypothesis")
        if (why := _not_there(path)) is not None:
            raise PolicyError(*at_fields(file, [(place, why)]))
        hypothesis = load_hypothesis(path)
        if (why := _not_a_patch(hypothesis)) is not None:
            raise PolicyError(*at_fields(file, [(place, why)]))
        if hypothesis.name in names:
            why = f"the hypothesis {hypothesis.name!r} is named twice"
            raise PolicyError(*at_fields(file, [(place, why)]))
        names.add(hypothesis.name)
        yield path, hypothesis


def _not_there(path: Path) -> str | None:
    try:
        there = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        there = False
    except OSError as error:  # a folder that is not for whoever serves, a name that is too long
        return f"{str(path)!r} cannot be read: {error.strerror}"
    return None if there else f"there is no file {str(path)!r}"


def _not_a_patch(hypothesis: Hypothesis) -> str | None:
    base, other = hypothesis.baseline, hypothesis.candidate
    if base.url is not None or other.url is not None:
        return "compares servers that run already: a policy can enable a `patch` only"
    if other.config not in (None, base.config) or not other.patch:
        return "its candidate is another policy file: a policy can enable a `patch` only"
    return None


def ledger_for(hypothesis: Path, policy: Configured | None) -> Ledger:
    """The ledger that holds a hypothesis' verdicts: the policy's, else beside the hypothesis."""
    named = policy.deployment.gate.ledger if policy is not None else None
    if policy is None or named is None:
        return Ledger.open(hypothesis.absolute().parent / LEDGER)
    return Ledger.open(policy.file.absolute().parent / Path(named).expanduser())


def ledgers(found: Gated) -> list[Ledger]:
    """Those that a policy goes by, each once; the one beside it, too."""
    policy = Configured(found.file, {}, found.deployment)
    files = (found.file, *(Path(one.file) for one in found.standings))
    return list(dict.fromkeys(ledger_for(file, policy) for file in files))
