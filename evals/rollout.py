"""From a verdict to all users: shadow, then steps; back at once where live traffic is against it.

Holds the candidate by a lease that it renews while the verdict stands; whatever becomes of this
process, the baseline serves when the lease is over. Goes on where it was after a restart. Knows
stages and what ends them; how a gateway is asked is steering.py's, what traffic says monitor.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from evals.incident import Incident, with_text
from evals.monitor import Monitor
from evals.steering import Candidate, Refused, Steered, Unreachable
from policies.ledger import Decision, Ledger, LedgerError
from telemetry import Observation

LOOK_S = 0.5  # between looks at what was observed
LEASE_S = 5.0  # what a gateway serves without hearing from here
PUT_LEASE_S = 90.0  # until the candidate's first replica is ready; nothing goes to it meanwhile
GONE_S = 60.0  # without any replica of the candidate
AWAY_S = 30.0  # without an answer, told again
KEPT = 2000  # latest observations, for an incident
SHOWN = ("signal", "margin", "pairs", "difference", "p_safe", "passed")  # of a signal, to people

Stage = Literal["shadow", "step"]
Result = Literal["promoted", "rolled back", "refused", "stopped"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One rollout of one candidate, and the verdict that speaks for it."""

    candidate: Candidate
    shadow_pairs: int
    steps: tuple[float, ...]
    min_step_s: float
    evidence: str = ""  # the verdict's file in the ledger

    @property
    def stages(self) -> int:
        return 1 + len(self.steps)

    def share(self, stage: int) -> float:
        """Of sessions. Stage 0 is the shadow, behind the last step comes the end."""
        return 0.0 if stage == 0 else self.steps[stage - 1]


@dataclass(slots=True)
class Progress:
    """Where a rollout is. Written after every look, so that it goes on from there."""

    id: str
    stage: int = 0
    began_at: float = 0.0  # of the stage
    cursor: str = ""
    ended: str = ""
    why: str = ""
    monitor: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".part")
        half.write_bytes(orjson.dumps(asdict(self)))
        half.replace(file)

    @classmethod
    def load(cls, file: Path) -> Progress | None:
        try:
            return cls(**orjson.loads(file.read_bytes()))
        except FileNotFoundError:
            return None


@dataclass(slots=True)
class Rollout:
    """One run of the controller. `verdict` says why the candidate may not be live, None: it may."""

    plan: Plan
    gateway: Steered
    monitor: Monitor
    progress: Progress
    file: Path  # of the progress
    ledger: Ledger
    verdict: Callable[[float], str | None]
    incidents: Path
    say: Callable[[str], None]
    stays: bool = False  # at the last step, once promoted, until it is stopped
    clock: Callable[[], float] = time.time
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    latest: list[Observation] = field(default_factory=list)
    _paused: str = ""  # why, as it was said last
    _told: bool = False  # the gateway, of the candidate as it runs now
    _gone_since: float | None = None
    _away_until: float = 0.0  # a gateway, or its store, that comes and goes is told once

    async def run(self) -> Result:
        """To the end, or until it is cancelled; the lease ends by itself then."""
        if self.progress.monitor:
            self.monitor.go_on(self.progress.monitor)
            self.say(f"goes on at {self._named()}, {self.monitor.pairs} shadow pairs")
        if not self.progress.began_at:
            self._begin_stage(self.progress.stage)
        while True:
            result = await self._look()
            if result is not None:
                return result
            await self.pause(LOOK_S)

    # ---- one look -------------------------------------------------------------------------------

    async def _look(self) -> Result | None:
        """Renews the lease, hears what was seen, and decides."""
        try:
            why = self.verdict(self.clock())
            if why is not None:
                return await self._stop(f"its verdict does not stand any more: {why}")
            told = await self._renew()
            await self._hear()
        except (Unreachable, LedgerError) as error:
            if self.clock() > self._away_until:
                self.say(f"{error}; without a lease the baseline serves")
            self._away_until = self.clock() + AWAY_S
            return None
        except Refused as refused:
            if refused.code == "rollout_ended":
                await self._hear()
                return await self._ended_there(await self.gateway.told() or {})
            if refused.code == "candidate_not_ready":
                return await self._while_gone(str(refused))
            self.say(f"the gateway refuses: {refused}")
            return "refused"
        if told["ended"]:
            return await self._ended_there(told)
        if not told["ready"]:
            return await self._while_gone("none of its replicas takes requests")
        self._gone_since = None
        if self.monitor.harm is not None:
            return await self._roll_back(self.monitor.harm)
        return None if self._stays_paused(told) else await self._advance()

    def _stays_paused(self, told: Mapping[str, Any]) -> bool:
        """Whether somebody has told the gateway that this stage is not to end yet."""
        why = str(told.get("paused") or "")
        if why != self._paused:
            self.say(f"paused at {self._named()}: {why}" if why else f"goes on at {self._named()}")
            self._paused = why
        return bool(why)

    async def _renew(self) -> dict[str, Any]:
        """The stage's lease. The candidate is told first, whose servers may be others than before
        a restart; and again to a gateway that has forgotten it."""
        share = self.plan.share(self.progress.stage)
        shadow = 1.0 if self.progress.stage == 0 else 0.0
        name = self.plan.candidate.id
        stage = self._stage()
        try:
            if self._told:
                return await self.gateway.lease(name, share, shadow, LEASE_S, stage)
        except Refused as refused:
            if refused.code != "rollout_not_found":
                raise
            self.progress.cursor = ""
        await self.gateway.put(self.plan.candidate, PUT_LEASE_S)
        self._told = True
        return await self.gateway.lease(name, share, shadow, LEASE_S, stage)

    def _stage(self) -> dict[str, Any]:
        return {
            "at": self.progress.stage, "steps": list(self.plan.steps),
            "began_at": self.progress.began_at, "min_step_s": self.plan.min_step_s,
            "shadow_pairs": self.plan.shadow_pairs, "pairs": self.monitor.pairs,
            "signals": [
                {name: one[name] for name in SHOWN}
                | {"p_harmful": min(one["p_harmful"], one["p_harmful_late_turns"])}
                for one in self.monitor.told()
            ],
        }  # fmt: skip

    async def _hear(self) -> None:
        seen, self.progress.cursor = await self.gateway.observations(self.progress.cursor)
        for one in seen:
            self.monitor.saw(one)
        self.latest = [*self.latest, *seen][-KEPT:]
        self._save()

    async def _while_gone(self, state: str) -> Result | None:
        """A candidate without replicas serves nobody; one that stays away has failed."""
        now = self.clock()
        if self._gone_since is None:
            self._gone_since = now
            self.say(f"the baseline serves: {state}")
        if now - self._gone_since < GONE_S:
            return None
        return await self._roll_back(f"no replica of it was ready for {GONE_S:.0f} s: {state}")

    # ---- stages ---------------------------------------------------------------------------------

    async def _advance(self) -> Result | None:
        progress, plan = self.progress, self.plan
        if progress.ended == "promoted" or not self._stage_is_done():
            return None
        if progress.stage + 1 < plan.stages:
            self.monitor.next_stage()
            self._begin_stage(progress.stage + 1)
            return None
        progress.ended = "promoted"
        self._save()
        self._record("promoted", 1.0)
        self.say("promoted: every step has held")
        return None if self.stays else await self._leave("promoted")

    def _stage_is_done(self) -> bool:
        """Time and proof: with a share, every signal has shown that nothing is lost; users see a
        candidate only after enough pairs of the shadow, of which none shows harm."""
        if self.progress.stage == 0:
            return self.monitor.pairs >= self.plan.shadow_pairs
        long_enough = self.clock() - self.progress.began_at >= self.plan.min_step_s
        return long_enough and self.monitor.passed

    def _begin_stage(self, stage: int) -> None:
        self.progress.stage, self.progress.began_at = stage, self.clock()
        self._save()
        self._record(self._named(), self.plan.share(stage))
        self.say(f"{self._named()}: {self.monitor.pairs} shadow pairs, {self._proved()}")

    def _named(self) -> str:
        share = self.plan.share(self.progress.stage)
        return "shadow" if self.progress.stage == 0 else f"{share:.4g} of sessions"

    def _proved(self) -> str:
        told = self.monitor.told()
        return f"{sum(one['passed'] for one in told)} of {len(told)} signals proved"

    # ---- endings --------------------------------------------------------------------------------

    async def _ended_there(self, told: Mapping[str, Any]) -> Result:
        why = str(told.get("ended") or "the gateway ended it")
        return await (self._roll_back(why) if told.get("blamed", True) else self._stop(why))

    async def _stop(self, why: str) -> Result:
        """Back to the baseline, through no fault of the candidate's."""
        try:
            await self.gateway.roll_back(self.plan.candidate.id, why, blamed=False)
        except (Refused, Unreachable) as error:
            self.say(f"the lease ends within {LEASE_S:g} s: {error}")
        self.progress.ended, self.progress.why = "stopped", why
        self._save()
        self._record("stopped", 0.0)
        self.say(f"stopped: {why}")
        return await self._leave("stopped")

    async def _roll_back(self, why: str) -> Result:
        """Everything back to the baseline, first of all; then what is to be known of it later."""
        name = self.plan.candidate.id
        left: str | None = None
        try:
            await self.gateway.roll_back(name, why)
            await self._hear()
        except (Refused, Unreachable) as error:
            left = str(error)  # the lease ends by itself
        roots = self.plan.candidate.roots
        folder = Incident(self.plan.candidate, why, self._named(), self.clock()).write(
            self.incidents, self.latest, self.monitor.told()
        )
        self.ledger.quarantine(
            self.plan.candidate.name, roots["candidate"], why, baseline=roots["baseline"],
            spec=roots["spec"], evidence=self.plan.evidence, at=self.clock(),
            detail={"rollout": name, "stage": self._named(), "incident": folder.name},
        )  # fmt: skip
        self.progress.ended, self.progress.why = "rolled back", why
        self._save()
        self.say(f"rolled back: {why}")
        if left is not None:
            self.say(f"the gateway could not be told, its lease ends within {LEASE_S:g} s: {left}")
        self.say(f"quarantined; what was seen: {folder}")
        ids = {one.id for one in self.latest}
        self.say(await with_text(folder, self.gateway, ids, self.pause))
        return await self._leave("rolled back")

    async def _leave(self, result: Result) -> Result:
        try:
            await self.gateway.remove(self.plan.candidate.id, result)
        except (Refused, Unreachable) as error:
            self.say(f"the candidate is still known to the gateway: {error}")
        return result

    # ---- records --------------------------------------------------------------------------------

    def _save(self) -> None:
        self.progress.monitor = self.monitor.state()
        self.progress.save(self.file)

    def _record(self, stage: str, share: float) -> None:
        candidate, roots = self.plan.candidate, self.plan.candidate.roots
        self.ledger.record(
            Decision(
                "rollout", candidate.name, roots["baseline"], roots["candidate"], roots["spec"],
                self.clock(), stage, evidence=self.plan.evidence,
                detail={"rollout": candidate.id, "share": share},
            )
        )  # fmt: skip
