"""`GET /admin/overview`: everything that the console shows, of all gateway processes behind a port.

Puts together what other modules know, and computes next to nothing; no text of a prompt or of an
answer is in it. Receipts are told to whoever may steer, of all tenants.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

from starlette.routing import Route
from starlette.types import Scope

from gateway import problems
from gateway.admin import Answer, Guarded
from gateway.arms import Arms
from gateway.edge import Edge, Live
from gateway.history import History, tiers
from gateway.intervals import apart
from gateway.kept import Kept
from gateway.lookups import routes as lookup_routes
from gateway.overviews import OVERLAP_S, history, together
from gateway.pause import Pause
from gateway.query import query
from gateway.replica import Replica
from gateway.siblings import Part, Question
from gateway.sieve import row
from gateway.tallies import PHASES, Tallies
from gateway.trace_ring import Ring
from gateway.variants import Variants

OVERVIEW_PATH = "/admin/overview"
WHAT = "overview"
AT_ONCE = 20  # samples
PASSED_AT_ONCE = 25  # requests, then others may go on
RECENT = 10  # requests in one answer; lookups.py has the others
LATE_S = 60.0  # of the requests whose quantiles are told


def routes(live: Live, variants: Variants, history: History, kept: Kept) -> list[Route]:
    """The console's own endpoints, behind the check of all that steers."""
    overview = Overview(live, variants, history, kept)
    return [
        Route(OVERVIEW_PATH, Guarded(live, {"GET": overview.told})),
        *lookup_routes(live, kept),
    ]


class Overview:
    """As one process sees it, which asks the others."""

    def __init__(
        self,
        live: Live,
        variants: Variants,
        history: History,
        kept: Kept,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._live = live
        self._variants = variants
        self._history = history
        self._kept = kept
        self._clock = clock
        self._arms = Arms(variants)
        self._siblings = live.edge.state.siblings
        if self._siblings is not None:
            self._siblings.answers[WHAT] = self._for_others
        self._process = {
            "id": secrets.token_hex(8),  # another one: the process has been started anew
            "pid": os.getpid(),
            "started_at": clock(),
            "version": _version(),
        }

    async def told(self, scope: Scope, _body: bytes) -> Answer:
        """All of it; with `since=`, samples after that moment alone."""
        since = _moment(scope)
        rollout = self._variants.told() or self._variants.last
        if rollout is not None:
            arms = await self._arms.told(rollout)
            both = "baseline" in arms and "candidate" in arms
            far = apart(arms["baseline"], arms["candidate"]) if both else None
            rollout = {**rollout, "arms": arms, "apart": far}
        own = await self._own()
        others = await self._others(since - OVERLAP_S)
        if not others:
            found, samples = [own], self._history.since(since)
        else:
            found = [own, *(one for one, _ in others)]
            kept = [self._history.since(since - OVERLAP_S), *(samples for _, samples in others)]
            samples = await history(kept, since)
        return 200, {**together(found, RECENT), "rollout": rollout, "samples": samples}

    async def _others(self, since: float) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """What each sibling knows, and its samples; of those that speak of the same things."""
        if self._siblings is None:
            return []
        told = await self._siblings.ask({"what": WHAT, "since": since})
        return [
            (parts[0][0], [sample for samples, _ in parts[1:] for sample in samples])
            for parts in told.values()
            if parts and parts[0][0]["process"]["version"] == self._process["version"]
        ]

    async def _for_others(self, question: Question) -> AsyncIterator[Part]:
        """What one process knows, then its samples, so many at a time."""
        yield await self._own(), b""
        pause = Pause()
        samples = self._history.since(question["since"])
        for at in range(0, len(samples), AT_ONCE):
            await pause()
            yield samples[at : at + AT_ONCE], b""

    async def _own(self) -> dict[str, Any]:
        """What this process knows, but for samples."""
        latest = await self._of_late()
        live, edge = self._live, self._live.edge
        gated = live.gated
        return {
            "at": self._clock(),
            "process": {**self._process, "of": edge.state.processes(edge.settings)},
            "in_flight": edge.pool.in_flight,
            "draining": edge.pool.draining,
            "keys": edge.keys.required,  # whether a request needs a tenant's
            "policy": {
                "file": gated.file.name if gated else None,
                "reloads": live.reloads,
                "edges": live.count,
                "refused": live.refused,
                "enforce": gated.deployment.gate.enforce if gated else None,
                "ungated": list(gated.ungated) if gated else [],
            },
            "phases": PHASES,
            "models": sorted({name for one in edge.pool.replicas for name in one.models}),
            "tiers": _tiers(edge, latest),
            "replicas": list(_replicas(edge)),
            "cached_tokens": edge.ladder.report(),
            "trim": None if edge.settings.trim.off else edge.shortener.totals.told(),
            "response_cache": edge.answers.told() if edge.answers is not None else None,
            "record": edge.recorder.told() if edge.recorder is not None else None,
            "state": edge.state.health(),
            "optimizations": gated.payload() if gated else [],
            "rollout_lost": self._variants.lost,
            "tokens": {
                "stages": edge.meters.stages,
                "checked": edge.meters.checked,
                "violations": {k: v for k, v in edge.meters.violations.items() if v},
            },
            "requests": [row(one) for one in islice(edge.tracer.ring, RECENT)],
            "kept_traces": edge.tracer.settings.keep,
        }

    async def _of_late(self) -> Mapping[str, Late]:
        edge = self._live.edge
        return await of_late(edge.tracer.ring, edge.admission.tallies, self._clock())


def _moment(scope: Scope) -> float:
    """What `since=` says; 0 without it. Raises Problem 400."""
    text = query(scope).get("since", "0")
    try:
        since = float(text)
    except ValueError:
        since = math.nan
    if math.isnan(since):
        raise problems.wrong_value("since", "seconds since 1970", problems.quote(text))
    return since


def _tiers(edge: Edge, latest: Mapping[str, Late]) -> list[dict[str, Any]]:
    """Every tier of the policy, the most urgent first, with what it promises and what it has."""
    asked = tiers(edge)
    rules = sorted(edge.admission.tiers.items(), key=lambda one: one[1].priority)
    return [
        {
            "name": name,
            "ttft_ms": rule.ttft_ms,
            "tpot_ms": rule.tpot_ms,
            "deadline_s": rule.deadline_s,
            "reserved_share": rule.reserved_share,
            "queue_max": rule.queue_max,
            "now": asked.get(name),
            "ttft_s": late.ttft_s,
            "slowest": late.slowest,
            "tpot_s": late.tpot_s,
        }
        for name, rule in rules
        for late in (latest.get(name, Late()),)
    ]


@dataclass(slots=True)
class Late:
    """What ended of late in one tier."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    slowest: tuple[float, str] | None = None  # whose first token took longest, and has a trace


async def of_late(ring: Ring, tallies: Tallies, now: float) -> Mapping[str, Late]:
    """What ended in the last minute, by tier. Streams go on meanwhile."""
    since = now - LATE_S
    found: dict[str, Late] = {}
    for name, tally in list(tallies.tiers.items()):
        timed = [one for one in tally.latest if one[0] >= since]
        found[name] = Late([s for _, s, _ in timed], [s for *_, s in timed if s is not None])
    pause = Pause()
    for at, one in enumerate(list(ring)):  # as it is now: others end between two pieces
        if at % PASSED_AT_ONCE == 0:
            await pause()
        if one.at + one.e2e_s < since:
            break
        if one.service is not None and (ttft_s := one.ttft_s) is not None:
            late = found.setdefault(one.service.tier, Late())
            late.slowest = max(late.slowest or (ttft_s, ""), (ttft_s, one.request_id))
    return found


def _replicas(edge: Edge) -> Iterator[dict[str, Any]]:
    now, routing = asyncio.get_running_loop().time(), edge.routing
    for one in edge.pool.replicas:
        known = routing.replicas.get(one.url)
        learned = known is not None and bool(known.pace.seen)
        yield {
            "url": one.url,
            "kind": one.kind,
            "own": one.own,
            "state": _state(one, now),
            "held": one.held,
            "error": one.error,
            "models": list(one.models),
            "fingerprint": one.fingerprint,
            "weight": one.weight,
            "in_flight": one.in_flight,
            "elsewhere": one.elsewhere.running,
            "waiting_tokens": one.waiting_tokens,
            "ttft_s": one.ttft_s,
            "tried": dict(edge.admission.tallies.tried.get(one.url, {})),  # by how it went
            "load": {name: one.facts.get(name) for name in ("running", "waiting", "blocks")},
            "rates": {
                "prefill_tokens_per_s": 1 / known.pace.s_per_token,
                "s_per_answer": known.pace.s_per_answer,
                "error_factor": known.pace.factor,
                "trusted": not known.pace.wrong,
                "busy": known.work.busy(routing.clock()),
            }
            if known is not None and learned
            else None,
        }


def _state(one: Replica, now: float) -> str:
    if one.spared or one.gone:
        return "draining"
    if not one.healthy:
        return "down" if one.tried else "starting"
    circuit = one.circuit.state(now)
    return "ready" if circuit == "closed" else circuit


def _version() -> str | None:
    """None where it runs from a folder that was never installed."""
    try:
        return version("headgate")
    except PackageNotFoundError:
        return None
