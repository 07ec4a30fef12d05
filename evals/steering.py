"""A gateway's rollout as its controller steers it over HTTP. Knows paths and answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
import orjson

from telemetry import Observation

VARIANT = "/admin/variants/candidate"
TIMEOUT_S = 5.0
PUT_TIMEOUT_S = 120.0  # until a replica of the candidate is ready
READ = 2000


class Unreachable(Exception):
    """The gateway does not answer, or not now: its lease runs out meanwhile."""


class Refused(Exception):
    """The gateway answers, and not what was asked; `code` is stable."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a gateway is told of a candidate, but for its share."""

    id: str
    name: str
    patch: Mapping[str, Any] = field(default_factory=dict)
    replicas: Sequence[Mapping[str, Any]] = ()
    fingerprints: Sequence[str] = ()
    roots: Mapping[str, str] = field(default_factory=dict)


class Steered:
    """One gateway. Use it as a context."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def put(self, candidate: Candidate, lease_s: float) -> Mapping[str, Any]:
        """Puts it up beside the baseline; nothing goes to it yet. Returns when it is ready."""
        body = {
            "id": candidate.id, "name": candidate.name, "patch": candidate.patch,
            "replicas": list(candidate.replicas), "fingerprints": list(candidate.fingerprints),
            "roots": candidate.roots, "share": 0.0, "shadow": 0.0, "lease_s": lease_s,
        }  # fmt: skip
        told = await self._ask("PUT", VARIANT, body, PUT_TIMEOUT_S)
        return _object(told["candidate"])

    async def lease(
        self, name: str, share: float, shadow: float, lease_s: float, stage: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`stage`: where the rollout is, for people who look at the gateway."""
        body = {
            "id": name, "share": share, "shadow": shadow, "lease_s": lease_s, "stage": stage,
        }  # fmt: skip
        return _object((await self._ask("PATCH", VARIANT, body))["candidate"])

    async def roll_back(self, name: str, why: str, *, blamed: bool = True) -> None:
        body = {"id": name, "why": why[:2000], "blamed": blamed}
        await self._ask("POST", f"{VARIANT}/rollback", body)

    async def remove(self, name: str, result: str) -> None:
        query = urlencode({"id": name, "result": result})
        await self._ask("DELETE", f"{VARIANT}?{query}")

    async def told(self) -> dict[str, Any] | None:
        """The rollout that runs there."""
        found = (await self._ask("GET", "/admin/variants"))["candidate"]
        return None if found is None else _object(found)

    async def recorded(self) -> Path | None:
        """Where it records live requests; None where it does not."""
        found = (await self._ask("GET", "/admin/variants")).get("recorded")
        return Path(found) if isinstance(found, str) else None

    async def observations(self, after: str) -> tuple[list[Observation], str]:
        """All since a cursor, and the next one."""
        found: list[Observation] = []
        while True:
            told = await self._ask("GET", f"/admin/observations?limit={READ}&after={after}")
            after = str(told["cursor"])
            found += [Observation.of(one) for one in told["observations"]]
            if len(told["observations"]) < READ:
                return found, after

    async def _ask(
        self, method: str, path: str, body: Any = None, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Raises Unreachable and Refused."""
        assert self._session is not None, "used outside of its context"
        data = None if body is None else orjson.dumps(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + path, data=data, timeout=timeout
            ) as answer:
                status, payload = answer.status, orjson.loads(await answer.read())
        except (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError) as error:
            raise Unreachable(f"{self.url} does not answer: {type(error).__name__}") from None
        if status == 200:
            return _object(payload)
        said = payload.get("error") if isinstance(payload, dict) else None
        said = said if isinstance(said, dict) else {}
        if status in (502, 503, 504) and said.get("code") != "candidate_not_ready":
            raise Unreachable(str(said.get("message", status)))
        raise Refused(status, str(said.get("code")), str(said.get("message", payload)))


def _object(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise Refused(200, "unreadable", "the answer is not what a gateway of ours says")
    return payload
