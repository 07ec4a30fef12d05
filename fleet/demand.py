"""What the gateways have for the replicas, as their /metrics tell it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from fleet.scaling import Demand

QUEUED = "headgate_gateway_queued_uncached_tokens"
RUNNING = "headgate_gateway_requests_running"
_ASK_S = 2.0


class Demands:
    """Asks gateways; usable inside `async with`."""

    def __init__(self, gateways: Sequence[str], key: str) -> None:
        self._pages = [f"{gateway}/metrics" for gateway in gateways]
        self._headers = {"authorization": f"Bearer {key}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Demands:
        timeout = aiohttp.ClientTimeout(total=_ASK_S)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self) -> Demand | None:
        """The sum over all gateways; None while any of them does not answer."""
        assert self._session is not None, "it is used outside of its `async with`"
        session = self._session
        try:
            pages = await asyncio.gather(*(self._page(session, page) for page in self._pages))
        except (aiohttp.ClientError, TimeoutError):
            return None
        return read("\n".join(pages))

    async def _page(self, session: aiohttp.ClientSession, url: str) -> str:
        async with session.get(url) as response:
            response.raise_for_status()
            return await response.text()


def read(page: str) -> Demand:
    """Of Prometheus text, whatever labels the samples have."""
    return Demand(_sum(page, QUEUED), _sum(page, RUNNING))


def _sum(page: str, name: str) -> float:
    samples = [line for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in samples)
