"""The candidate's servers of a rollout: workers that are started here and die with us, or URLs.

Knows what of a candidate is workers' and what is the gateway's; knows no shares.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from evals.arm_policy import write_policy
from evals.arms import FRONT, START_S
from evals.processes import serving
from policies.patching import Configured, differences

ASK_S = 10.0
_WORKER = re.compile(r"^\s+(?:metrics\s+)?(http://\S+)/metrics$")


@dataclass(frozen=True, slots=True)
class Servers:
    """As a gateway is told of them. None of either: the baseline's own."""

    replicas: tuple[dict[str, Any], ...] = ()
    fingerprints: tuple[str, ...] = ()  # what they are now, and have to stay


def needs_workers(baseline: Configured | None, candidate: Configured | None) -> bool:
    """Whether more changes than the gateway."""
    if baseline is None or candidate is None:
        return False
    paths = differences(baseline.deployment, candidate.deployment)
    return any(path.startswith("runtime") for path in paths)


def gateway_patch(baseline: Configured | None, candidate: Configured | None) -> dict[str, Any]:
    """What of the candidate is the gateway's: `gateway.…` -> value."""
    if baseline is None or candidate is None:
        return {}
    after = candidate.deployment.model_dump(mode="json")
    found = {}
    for path in differences(baseline.deployment, candidate.deployment):
        if path.startswith("gateway."):
            value: Any = after
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            found[path] = value
    return found


@contextlib.asynccontextmanager
async def started(candidate: Configured, folder: Path) -> AsyncIterator[Servers]:
    """Its workers, by `headgate serve` with a front of its own, which nobody asks. Raises
    NotServing, with the last words."""
    data = {
        "version": 1,
        "gateway": {},
        "runtime": candidate.data.get("runtime") or {},
        "gate": {"enforce": "off"},  # what may be served here, the rollout's verdict says
    }
    policy = write_policy(replace(candidate, data=data), folder)
    argv = (sys.executable, "-P", "-m", "headgate", "serve", str(policy))
    log = folder / "serve.log"
    async with serving(
        argv, {"HEADGATE_PORT": "0"}, log, lambda line: FRONT.match(line) is not None, START_S
    ) as said:
        urls = [found[1] for line in said if (found := _WORKER.match(line))]
        runtime = candidate.deployment.runtime
        more = {"api_key_env": runtime.key_env} if runtime and runtime.key_env else {}
        yield await known([{"url": url, "kind": "headgate", **more} for url in urls])


async def known(replicas: Sequence[dict[str, Any]]) -> Servers:
    """With what each of them says that it is; others than ours have nothing to say."""
    fingerprints = []
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for replica in replicas:
            key = os.environ.get(replica.get("api_key_env") or "")
            headers = {"authorization": f"Bearer {key}"} if key else {}
            unreadable = (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError)
            with contextlib.suppress(*unreadable):
                url = f"{replica['url']}/v1/fingerprint"
                async with session.get(url, headers=headers) as answer:
                    told = orjson.loads(await answer.read())
                if isinstance(told, dict) and isinstance(told.get("system_fingerprint"), str):
                    fingerprints.append(told["system_fingerprint"])
    complete = len(fingerprints) == len(replicas)
    return Servers(tuple(replicas), tuple(sorted(set(fingerprints))) if complete else ())
