"""How a replica's health is learned: from its /health, or from /v1/models where there is none.

Health does not lie: a refused connection or a 503 takes a replica out at once, and a request that
could not connect asks for a probe at once. Mere slowness takes several probes, because a busy
worker answers late.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from gateway.client import Client
from gateway.problems import quote
from gateway.replica import Replica, describe
from gateway.response import Broken, Stale
from runtime.wire import CHALLENGE_HEADER, Problem, parse_object, run_proof

log = logging.getLogger("headgate.gateway")

STARTING_S = 0.5  # between probes of an own worker that is not ready
FOREIGN_DOWN_S = 5.0  # between probes of somebody else's server that is not
READY_S = 2.0  # between probes of a ready one that has a /health
MODELS_S = 15.0  # between readings of /v1/models, which is all that some foreign servers offer
AGAIN_S = 0.1  # the least pause between probes, however often a replica is doubted
PROBE_TIMEOUT_S = 5.0
SLOW_MAX = 3  # unanswered probes in a row that take a ready replica out
ANSWER_MAX_BYTES = 2**20
MODELS_MAX = 4096
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Unwell(Exception):
    """A replica said, or showed, that it cannot take requests."""


class Watch:
    """The probes of one replica."""

    def __init__(self, client: Client, replica: Replica) -> None:
        self._client = client
        self._replica = replica
        self._slow = 0
        self._models_at = float("-inf")  # loop time of the last reading of /v1/models
        self._tells_fingerprint = True

    async def run(self) -> None:
        """Probes until cancelled."""
        has_health = True
        while True:
            self._replica.doubt.clear()
            try:
                has_health = await self.probe()
            except Exception:  # whatever a server answers, its watch goes on
                log.exception("the probe of %s failed inside the gateway", self._replica.url)
                self._take_out("its probe failed inside the gateway; see the log")
            await asyncio.sleep(AGAIN_S)
            await self._pause(READY_S if has_health else MODELS_S)

    async def _pause(self, ready_s: float) -> None:
        pause_s = ready_s
        if not self._replica.healthy:
            pause_s = STARTING_S if self._replica.own else FOREIGN_DOWN_S
        # Not wait_for: up to Python 3.11 it swallows a cancellation that comes with the event, and
        # the shutdown would wait for ever.
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._replica.doubt.wait()

    async def probe(self) -> bool:
        """Asks once and notes the result; False when the replica has no /health."""
        replica = self._replica
        has_health = True
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                has_health = await self._ask_health()
                await self._learn_models(has_health)
            self._slow = 0
            replica.mark_ready()
        except TimeoutError:
            self._slow += 1
            if not replica.healthy or self._slow >= SLOW_MAX:
                self._take_out(f"no answer to a probe within {PROBE_TIMEOUT_S:g} s")
        except (Unwell, Problem) as error:
            self._take_out(str(error))
        except Broken as error:
            self._take_out(describe(error))
        return has_health

    def _take_out(self, error: str) -> None:
        self._replica.mark_down(error)
        self._replica.doubt.clear()  # this probe was the answer to the doubt
        self._models_at = float("-inf")  # whatever comes back may serve something else
        self._tells_fingerprint = True

    async def _ask_health(self) -> bool:
        challenge = secrets.token_hex(16)
        more = {CHALLENGE_HEADER: challenge}
        status, body = await fetch(self._client, self._replica, "/health", more)
        if 200 <= status < 300:
            facts = _facts(body)
            self._check_proof(challenge, facts)
            self._replica.facts = facts
            return True
        if 400 <= status < 500:
            return False
        raise Unwell(f"/health answered {status}: {quote(body.decode('utf-8', 'replace'))}")

    def _check_proof(self, challenge: str, facts: Mapping[str, Any]) -> None:
        """A dead worker's port may have been taken by whatever asked for a free one."""
        token = self._replica.run_token
        if token is not None:
            proof = str(facts.get("proof")).encode("utf-8", "replace")
            if not hmac.compare_digest(proof, run_proof(token, challenge).encode()):
                raise Unwell("another program answers at the port of this worker")

    async def _learn_models(self, has_health: bool) -> None:
        now = asyncio.get_running_loop().time()
        if has_health and now - self._models_at < MODELS_S:
            return
        status, body = await fetch(self._client, self._replica, "/v1/models")
        if status in (401, 403):
            raise Unwell(f"/v1/models answered {status}: check api_key_env of this upstream")
        if status != 200:
            raise Unwell(f"/v1/models answered {status}")
        self._replica.models = models_of(parse_object(body))
        self._replica.fingerprint = await self._ask_fingerprint()
        self._models_at = now

    async def _ask_fingerprint(self) -> str | None:
        """None for a server that has no fingerprint to tell; it is asked once, when it is back."""
        if not self._tells_fingerprint:
            return None
        status, body = await fetch(self._client, self._replica, "/v1/fingerprint")
        try:
            told = parse_object(body).get("system_fingerprint") if status == 200 else None
        except Problem:
            told = None
        self._tells_fingerprint = isinstance(told, str) and bool(told)
        return told if self._tells_fingerprint else None


def _facts(body: bytes) -> Mapping[str, Any]:
    """What a server tells of itself; vLLM's answer is empty."""
    try:
        return parse_object(body)
    except Problem:
        return {}


async def fetch(
    client: Client,
    replica: Replica,
    path: str,
    more: Mapping[str, str] = NO_HEADERS,
    method: str = "GET",
) -> tuple[int, bytes]:
    """Status and body of a short answer. Raises Unwell for a body that is too large for one."""
    headers = {"accept-encoding": "identity", **more}
    if replica.api_key is not None:
        headers["authorization"] = f"Bearer {replica.api_key}"
    try:
        response = await client.send(method, replica.url, path, headers)
    except Stale:
        response = await client.send(method, replica.url, path, headers, fresh=True)
    body = bytearray()
    try:
        while piece := await response.readany():
            body += piece
            if len(body) > ANSWER_MAX_BYTES:
                raise Unwell(f"{path} answered more than {ANSWER_MAX_BYTES} bytes")
    finally:
        response.close()
    return response.status, bytes(body)


async def ask(
    client: Client, replica: Replica, path: str, method: str = "GET"
) -> dict[str, Any] | None:
    """The JSON object that a replica answers with 200; None for anything else."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            status, body = await fetch(client, replica, path, method=method)
        return parse_object(body) if status == 200 else None
    except (Unwell, Problem, TimeoutError, Broken):
        return None


def models_of(listing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Model id -> its entry in OpenAI's shape, further fields kept. Raises Unwell for none."""
    entries = listing.get("data")
    if not isinstance(entries, list):
        raise Unwell("/v1/models answered no list of models")
    models = {}
    for entry in entries[:MODELS_MAX]:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            models[entry["id"]] = {"object": "model", "created": 0, "owned_by": "unknown"} | entry
    if not models:
        raise Unwell("/v1/models names no model")
    return models
