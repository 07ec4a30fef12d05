"""A policy file -> what of it may be served now: with the patches of optimizations that may.

Everything that starts by a policy asks here: `headgate serve`, the runtime, the gateway, at its
start and when it reads the policy again, and `headgate gate status`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policies.devices import Devices, devices
from policies.edge import Gateway
from policies.hypothesis import Hypothesis
from policies.knobs import KNOBS
from policies.leaves import Binder
from policies.ledger import Ledger, LedgerError, Reading
from policies.load import at_fields, load_hypothesis, read_yaml
from policies.patching import Configured, configured
from policies.problems import PolicyError
from policies.schema import Deployment, Runtime
from policies.standing import Question, Standing, judged

# Lossy knobs that say what is served, not how it is made cheaper.
_THE_MODEL = ("runtime.model", "runtime.revision")
LEDGER = Path(".headgate", "ledger")
# What only a restart can change: an optimization of it stays as it began.
_FIXED = ("runtime.", "gateway.processes")
# What `headgate serve` has told already; the programs that it starts tell what is otherwise.
TOLD = "HEADGATE_OPTIMIZATIONS"

Row = tuple[str, str, str]  # what, its state, why


@dataclass(frozen=True, slots=True)
class Gated:
    """A policy as it is served: with the patches of the optimizations that are enabled."""

    file: Path
    deployment: Deployment
    standings: tuple[Standing, ...] = ()
    ungated: tuple[str, ...] = ()  # lossy knobs that the policy itself sets: the operator's word
    damaged: tuple[int, ...] = ()  # lines of the ledger that are no decisions

    @property
    def states(self) -> str:
        """In one line."""
        return " ".join(
            f"{one.hypothesis}={one.state}{'' if one.enabled else '-'}" for one in self.standings
        )

    def payload(self) -> list[dict[str, Any]]:
        return [one.payload() for one in self.standings]


def gated(
    file: str | Path,
    deployment: Deployment,
    now: float,
    told: Callable[[], Devices] = devices,
    serving: Gated | None = None,
) -> Gated:
    """The policy in `file`, which says `deployment`, as it may be served at this moment; or beside
    what is `serving`, with what only a restart can change as it is there.

    Raises PolicyError for hypotheses that are wrong, or that no policy can enable.
    """
    free = tuple(ungated(deployment))
    file = Path(file).absolute()
    if not deployment.optimizations:
        return Gated(file, deployment, ungated=free)
    data, _, _ = read_yaml(str(file))
    chain = Chain(Configured(file, data, deployment), now, told, serving)
    for path, hypothesis in hypotheses(file, deployment):
        chain.add(path, hypothesis)
    damaged = tuple(sorted({one for known in chain.readings.values() for one in known.damaged}))
    return Gated(file, chain.so_far.deployment, tuple(chain.standings), free, damaged)


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
        asked = Question(
            path, hypothesis, before.deployment, after.deployment, self._policy.deployment.gate,
            ledger, reading, self._binder, self._now,
        )  # fmt: skip
        one = judged(asked)
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


def check_optimizations(file: str | Path, deployment: Deployment) -> None:
    """Raises PolicyError for hypotheses that are wrong, or that this policy could not enable."""
    asks_nobody = deployment.gate.model_copy(update={"enforce": "off"})
    gated(file, deployment.model_copy(update={"gate": asks_nobody}), 0.0)


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


def hypotheses(file: Path, deployment: Deployment) -> Iterator[tuple[Path, Hypothesis]]:
    """Those that the policy names, with their files. Raises PolicyError."""
    names: set[str] = set()
    for at, one in enumerate(deployment.optimizations):
        path = file.parent / Path(one.hypothesis).expanduser()
        place = ("optimizations", at, "hypothesis")
        if not path.is_file():
            raise PolicyError(*at_fields(file, [(place, f"there is no file {str(path)!r}")]))
        hypothesis = load_hypothesis(path)
        if (why := _not_a_patch(hypothesis)) is not None:
            raise PolicyError(*at_fields(file, [(place, why)]))
        if hypothesis.name in names:
            why = f"the hypothesis {hypothesis.name!r} is named twice"
            raise PolicyError(*at_fields(file, [(place, why)]))
        names.add(hypothesis.name)
        yield path, hypothesis


def _not_a_patch(hypothesis: Hypothesis) -> str | None:
    base, other = hypothesis.baseline, hypothesis.candidate
    if base.url is not None or other.url is not None:
        return "compares servers that run already: a policy can enable a `patch` only"
    if other.config not in (None, base.config) or not other.patch:
        return "its candidate is another policy file: a policy can enable a `patch` only"
    return None


def ungated(deployment: Deployment) -> Iterator[str]:
    """Lossy knobs that the policy itself turns on."""
    parts = {"gateway": (Gateway(), deployment.gateway), "runtime": (Runtime(), deployment.runtime)}
    for knob, kind in KNOBS.items():
        if not kind.startswith("lossy") or knob in _THE_MODEL:
            continue
        part, _, name = knob.partition(".")
        default, said = parts[part]
        if said is not None and getattr(said, name) != getattr(default, name):
            yield knob


# ---- what a person reads ------------------------------------------------------------------------


def rows(found: Gated) -> list[Row]:
    """A line each of what is on, off, stale or quarantined, what nobody judged, what is damaged."""
    told: list[Row] = [(f"optimization {one.hypothesis}", *_said(one)) for one in found.standings]
    why = "lossy, and set in the policy itself: no verdict speaks of it"
    told += [(knob, "ungated", why) for knob in found.ungated]
    if found.damaged:
        lines = ", ".join(map(str, found.damaged[:5]))
        told.append(("ledger", "damaged", f"no decision can be read from line {lines}"))
    return told


def _said(one: Standing) -> tuple[str, str]:
    state = one.state
    if one.enabled and state != "on":
        return f"{state}, served", one.why
    if state == "on" and not one.enabled:
        return "off", one.why
    if state != "on" or one.made_at is None or one.expires_at is None:
        return state, one.why
    what = ", ".join(one.knobs)
    span = f"passed on {_day(one.made_at)}, holds until {_day(one.expires_at)}"
    return state, f"{what}: {span}" + (f"; {one.why}" if one.why else "")


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def news(found: Gated, environ: Mapping[str, str] = os.environ) -> list[Row]:
    """The rows, unless whoever started this program has told the same."""
    return [] if environ.get(TOLD) == found.states else rows(found)


def for_children(found: Gated) -> dict[str, str]:
    """Environment for programs that `found` was told of, and that go by the same policy."""
    return {TOLD: found.states}
