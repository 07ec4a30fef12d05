"""A policy file -> what of it may be served now: with the patches of optimizations that may.

Everything that starts by a policy asks here: `headgate serve`, the runtime, the gateway, at its
start and when it reads the policy again, and `headgate gate status`. What it takes to judge is
imported once there is something to judge.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.devices import Devices, devices
from policies.edge import Gateway
from policies.knobs import KNOBS
from policies.schema import Deployment, Runtime

if TYPE_CHECKING:
    from policies.standing import Standing

# Lossy knobs that say what is served, not how it is made cheaper.
_THE_MODEL = ("runtime.model", "runtime.revision")
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
    data: Any = None,
) -> Gated:
    """The policy in `file`, which says `deployment`, as it may be served at this moment; or beside
    what is `serving`, with what only a restart can change as it is there. `data`: what the file
    says, where it was read already.

    Raises PolicyError for hypotheses that are wrong, or that no policy can enable.
    """
    free = tuple(ungated(deployment))
    file = Path(file).absolute()
    if not deployment.optimizations:
        return Gated(file, deployment, ungated=free)
    from policies.chain import Chain, hypotheses
    from policies.load import read_yaml
    from policies.patching import Configured

    if data is None:
        data, _, _ = read_yaml(str(file))
    chain = Chain(Configured(file, data, deployment), now, told, serving)
    for path, hypothesis in hypotheses(file, deployment):
        chain.add(path, hypothesis)
    damaged = tuple(sorted({one for known in chain.readings.values() for one in known.damaged}))
    return Gated(file, chain.so_far.deployment, tuple(chain.standings), free, damaged)


def check_optimizations(file: str | Path, deployment: Deployment) -> None:
    """Raises PolicyError for hypotheses that are wrong, or that this policy could not enable."""
    asks_nobody = deployment.gate.model_copy(update={"enforce": "off"})
    gated(file, deployment.model_copy(update={"gate": asks_nobody}), 0.0)


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
    told: list[Row] = [(f"optimization {one.hypothesis}", *said(one)) for one in found.standings]
    why = "lossy, and set in the policy itself: no verdict speaks of it"
    told += [(knob, "ungated", why) for knob in found.ungated]
    if found.damaged:
        lines = ", ".join(map(str, found.damaged[:5]))
        told.append(("ledger", "damaged", f"no decision can be read from line {lines}"))
    return told


def said(one: Standing) -> tuple[str, str]:
    """Its state and why, as people read it."""
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
