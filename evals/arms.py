"""The arms of a comparison, each a server that answers: ours, started and stopped here, or a URL.

Baseline, candidate, the baseline again (A/A), and the baseline spoiled (sabotage). Knows what to
ask a server about itself; knows no requests and no judgement.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import aiohttp
import orjson

from evals.arm_policy import write_policy
from evals.client import Targets
from evals.keys import keyed
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE
from evals.processes import NotServing, serving
from policies.hypothesis import Design, Hypothesis, Variant
from policies.patching import Configured

SPOILED = "spoiled"  # a baseline, started for the sabotaged arm alone

START_S = 900.0  # a model of many GB from a slow disk, and its kernels compiled
EDGE_START_S = 30.0  # a gateway alone: what it waits for then are servers that should run already
ASK_S = 10.0
FRONT = re.compile(r"^\s+(http://\S+)/v1$")  # `headgate serve` says it once it is ready
_PAGE = re.compile(r"^\s+metrics\s+(http://\S+/metrics)$")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{[^}]*\})?\s+(\S+)", re.MULTILINE)
# Of several gateway processes one that did not answer when their common page was made.
_UNTOLD = re.compile(r"^headgate_gateway_process_told\{[^}]*\} 0", re.MULTILINE)
_LOOKS, _LOOK_S = 5, 0.5  # at such a page, and between two of them: it may be starting anew
_TYPE = re.compile(r"^# TYPE ([a-zA-Z_:][\w:]*)", re.MULTILINE)
# Of a server that starts, for another one that does not load, but is not there.
_WAITS = re.compile(r"still waiting for (?!.*\bloading\b)")
_UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Arm:
    """Where it answers. `pages` are its /metrics; `fingerprints` each that its answers may carry,
    empty where it tells none; `broken` says why it does not answer, "" where it does.
    """

    name: str
    url: str
    key: str | None = None
    model: str = ""
    pages: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    broken: str = ""
    scrape_key: str | None = None  # of its /metrics, where `key` does not open them


@dataclass(frozen=True, slots=True)
class Starting:
    """How the arms of a hypothesis are brought up. `folder` takes their policies and logs; `say`
    is told what takes long.
    """

    hypothesis: Hypothesis
    configured: Sequence[Configured | None]
    folder: Path
    say: Callable[[str], None] = lambda _line: None
    edge_s: float = EDGE_START_S

    @property
    def names(self) -> tuple[str, ...]:
        design = self.hypothesis.design
        controls = ((AA, design.aa_control), (SABOTAGE, design.sabotage_control))
        return (BASELINE, CANDIDATE, *(name for name, wanted in controls if wanted))

    async def up(self, stack: contextlib.AsyncExitStack, name: str) -> Arm:
        """Alive until the stack is left. One that does not come up is `broken`."""
        if name == SABOTAGE:
            return await self.spoiled(stack, await self.up(stack, SPOILED))
        at = int(name == CANDIDATE)
        variant = tuple(keyed(self.hypothesis, self.configured))[at]
        one = self.configured[at]
        edge = one is not None and one.deployment.runtime is None
        within_s = self.edge_s if edge else START_S
        return await _up(stack, name, variant, one, self.folder, within_s, self.say)

    @property
    def caches_live_on(self) -> bool:
        """From block to block; who asks a server for another arm changes what it finds cached."""
        return not self.hypothesis.design.cold_blocks

    async def spoiled(self, stack: contextlib.AsyncExitStack, baseline: Arm) -> Arm:
        design, seed = self.hypothesis.design, self.hypothesis.stats.seed
        return await _spoiled(stack, baseline, design, seed, self.folder)


@contextlib.asynccontextmanager
async def started(starting: Starting) -> AsyncIterator[Mapping[str, Arm]]:
    """All arms of the design, alive side by side until the context is left. One that does not come
    up is there, and `broken`; what would have come behind it is not started either.
    """
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, Arm] = {}
        # One after the other: a worker measures itself as it starts, and chooses by that.
        for name in starting.names:
            broken = next((one for one in found.values() if one.broken), None)
            if broken is not None:
                found[name] = Arm(name, "", broken=f"not started: the {broken.name} does not run")
            elif name == SABOTAGE and not starting.caches_live_on:
                found[name] = await starting.spoiled(stack, found[BASELINE])
            else:
                found[name] = await starting.up(stack, name)
        yield found


class InTurn:
    """One arm at a time, in the place of the one before: where both do not fit. Use it as a
    context; `tell` gets each as it comes up.
    """

    def __init__(self, starting: Starting, tell: Callable[[Arm], None]) -> None:
        self._starting = starting
        self._tell = tell
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def start(self, name: str) -> Arm:
        await self._stack.aclose()
        arm = await self._starting.up(self._stack, name)
        self._tell(arm)
        return arm


@contextlib.asynccontextmanager
async def beside(
    policies: Mapping[str, Configured], folder: Path
) -> AsyncIterator[Mapping[str, Arm]]:
    """An arm for each policy, under its name, alive side by side until the context is left."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await _up(stack, name, Variant(), one, folder) for name, one in policies.items()
        }


async def _up(
    stack: contextlib.AsyncExitStack,
    name: str,
    variant: Variant,
    configured: Configured | None,
    folder: Path,
    within_s: float = START_S,
    say: Callable[[str], None] = lambda _line: None,
) -> Arm:
    key = os.environ.get(variant.api_key_env) if variant.api_key_env else None
    try:
        if configured is None:
            assert variant.url is not None
            url = variant.url.rstrip("/").removesuffix("/v1")
            arm = Arm(name, url, key, variant.model or "", (f"{url}/metrics",))
            opens = variant.metrics_key_env
            return await _known(replace(arm, scrape_key=os.environ.get(opens) if opens else None))
        own = folder / name
        policy = write_policy(configured, own)
        said = await stack.enter_async_context(
            serving(
                (sys.executable, "-P", "-m", "headgate", "serve", str(policy)),
                {"HEADGATE_PORT": "0"},
                own / "serve.log",
                lambda line: FRONT.match(line) is not None,
                within_s,
                lambda line: say(f"  {name:<10}{line}") if _WAITS.match(line) else None,
            )
        )
        url = next(found[1] for line in said if (found := FRONT.match(line)))
        pages = [found[1] for line in said if (found := _PAGE.match(line))]
        arm = Arm(name, url, key, variant.model or "", (f"{url}/metrics", *pages))
        operator = configured.deployment.gateway.admin.key_env
        return await _known(replace(arm, scrape_key=os.environ.get(operator) if operator else None))
    except NotServing as error:
        return Arm(name, "", broken=str(error))
    except (*_UNREACHABLE, orjson.JSONDecodeError, LookupError) as error:
        why = f"{variant.url or name} does not answer: {type(error).__name__}: {error}"
        return Arm(name, variant.url or "", broken=why)


async def _spoiled(
    stack: contextlib.AsyncExitStack, baseline: Arm, design: Design, seed: int, folder: Path
) -> Arm:
    if baseline.broken:
        return replace(baseline, name=SABOTAGE)
    own = folder / SABOTAGE
    own.mkdir(parents=True, exist_ok=True)
    options = ("--wrong", design.sabotage_wrong, "--slow", design.sabotage_slow, "--seed", seed)
    said = await stack.enter_async_context(
        serving(
            (sys.executable, "-P", "-m", "evals.sabotage", baseline.url, *map(str, options)),
            {},
            own / "serve.log",
            lambda line: line.startswith("http://"),
            START_S,
        )
    )
    return replace(baseline, name=SABOTAGE, url=said[-1])


async def _known(arm: Arm) -> Arm:
    """With what the server says of itself: the name of its model, its fingerprints."""
    async with _session(arm.key) as session:
        models = await _object(session, f"{arm.url}/v1/models")
        model = arm.model or str(models["data"][0]["id"])
        told: Mapping[str, Any] = {}
        # Others than ours have none to tell.
        with contextlib.suppress(*_UNREACHABLE, orjson.JSONDecodeError):
            told = await _object(session, f"{arm.url}/v1/fingerprint")
    return replace(arm, model=model, fingerprints=tuple(sorted(set(_fingerprints(told)))))


def _fingerprints(told: Mapping[str, Any]) -> Iterable[str]:
    """Of a worker, or of a gateway with what each of its replicas says."""
    if isinstance(told.get("system_fingerprint"), str):
        yield told["system_fingerprint"]
        return
    for entry in told.get("data") or ():
        if isinstance(entry.get("fingerprint"), dict):
            yield from _fingerprints(entry["fingerprint"])


Series = tuple[str, str, str]  # page, name, labels


async def series(arm: Arm) -> dict[Series, float]:
    """Every sample at the arm's /metrics. A page that does not answer has none."""
    found: dict[Series, float] = {}
    async for page, text in _texts(arm):
        for name, labels, value in _SAMPLE.findall(text):
            with contextlib.suppress(ValueError):
                found[page, name, labels] = float(value)
    return found


def summed(found: Mapping[Series, float]) -> dict[str, float]:
    """By name, over labels and pages."""
    sums: dict[str, float] = {}
    for (_, name, _), value in found.items():
        sums[name] = sums.get(name, 0.0) + value
    return sums


def risen(before: Mapping[Series, float], after: Mapping[Series, float]) -> dict[str, float]:
    """By how much counters have grown, by name. A series that fell began again, with its process:
    of a sum of several it could not be told by how much."""
    grown = {}
    for one, value in after.items():
        first = before.get(one, 0.0)
        growth = value - first if value >= first else value
        if growth > 0:
            grown[one] = growth
    return summed(grown)


async def counted(arm: Arm) -> frozenset[str]:
    """What the arm's /metrics tell by name, also what has no sample yet."""
    names: set[str] = set()
    async for _, text in _texts(arm):
        names.update(_TYPE.findall(text), (name for name, _, _ in _SAMPLE.findall(text)))
    return frozenset(names)


async def _texts(arm: Arm) -> AsyncIterator[tuple[str, str]]:
    """Of each page that answers, whole if it becomes so."""
    if arm.broken:
        return
    async with _session(arm.scrape_key or arm.key) as session:
        for page in arm.pages:
            with contextlib.suppress(*_UNREACHABLE):
                text = await _text(session, page)
                for _ in range(_LOOKS - 1):
                    if not _UNTOLD.search(text):
                        break
                    await asyncio.sleep(_LOOK_S)
                    text = await _text(session, page)
                yield page, text


async def _text(session: aiohttp.ClientSession, page: str) -> str:
    async with session.get(page) as answer:
        return await answer.text() if answer.status == 200 else ""


def targets(configured: Configured | None) -> dict[str, Targets]:
    """What each tier of a policy promises, in seconds; both arms are held to the baseline's."""
    if configured is None:
        return {}
    return {
        name: Targets(_seconds(tier.ttft_ms), _seconds(tier.tpot_ms))
        for name, tier in configured.deployment.gateway.tiers.items()
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _session(key: str | None) -> aiohttp.ClientSession:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=ASK_S))


async def _object(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as answer:
        answer.raise_for_status()
        found = orjson.loads(await answer.read())
    return found if isinstance(found, dict) else {}
