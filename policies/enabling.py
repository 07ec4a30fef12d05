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

from policies.binding import Binder
from policies.devices import Devices, devices
from policies.edge import Gateway
from policies.hypothesis import Hypothesis
from policies.knobs import KNOBS
from policies.ledger import Ledger, LedgerError, Reading
from policies.load import at_fields, load_hypothesis, read_yaml
from policies.patching import Configured, configured
from policies.problems import PolicyError
from policies.schema import Deployment, Runtime
from policies.standing import Question, Standing, judged

# Lossy knobs that say what is served, not how it is made cheaper.
_THE_MODEL = ("runtime.model", "runtime.revision")
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
    ledger = ledger_of(file, deployment)
    try:
        reading, unreadable = ledger.read(), ""
    except LedgerError as error:
        reading, unreadable = Reading(), str(error)
    binder = Binder(file, told)
    data, _, _ = read_yaml(str(file))
    so_far = Configured(file, data, deployment)
    standings: list[Standing] = []
    for at, (path, hypothesis) in enumerate(hypotheses(file, deployment)):
        after = configured(file, so_far.data, path, "candidate", hypothesis.candidate)
        _refuse_twice(file, at, hypothesis, standings)
        before, gate = so_far.deployment, deployment.gate
        one = judged(
            Question(path, hypothesis, before, after.deployment, gate, ledger, reading, binder, now)
        )
        if unreadable and not one.enabled:
            one = replace(one, why=unreadable)
        if serving is not None:
            one = _held(one, serving)
        standings.append(one)
        so_far = after if one.enabled else so_far
    return Gated(file, so_far.deployment, tuple(standings), free, reading.damaged)


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


def ledger_of(file: str | Path, deployment: Deployment) -> Ledger:
    """The ledger that a policy goes by."""
    beside = Path(file).absolute().parent
    return Ledger.open(beside / Path(deployment.gate.ledger).expanduser())


def hypotheses(file: Path, deployment: Deployment) -> Iterator[tuple[Path, Hypothesis]]:
    """Those that the policy names, with their files. Raises PolicyError."""
    for at, one in enumerate(deployment.optimizations):
        path = file.parent / Path(one.hypothesis).expanduser()
        place = ("optimizations", at, "hypothesis")
        if not path.is_file():
            raise PolicyError(*at_fields(file, [(place, f"there is no file {str(path)!r}")]))
        hypothesis = load_hypothesis(path)
        if (why := _not_a_patch(hypothesis)) is not None:
            raise PolicyError(*at_fields(file, [(place, why)]))
        yield path, hypothesis


def _not_a_patch(hypothesis: Hypothesis) -> str | None:
    base, other = hypothesis.baseline, hypothesis.candidate
    if base.url is not None or other.url is not None:
        return "compares servers that run already: a policy can enable a `patch` only"
    if other.config not in (None, base.config) or not other.patch:
        return "its candidate is another policy file: a policy can enable a `patch` only"
    return None


def _refuse_twice(file: Path, at: int, hypothesis: Hypothesis, before: list[Standing]) -> None:
    if any(one.hypothesis == hypothesis.name for one in before):
        why = f"the hypothesis {hypothesis.name!r} is named twice"
        raise PolicyError(*at_fields(file, [(("optimizations", at, "hypothesis"), why)]))


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
