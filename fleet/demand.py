"""What the gateways have for the replicas, as their /metrics tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import aiohttp

from fleet.scaling import Demand

QUEUED = "headgate_gateway_queued_uncached_tokens"
RUNNING = "headgate_gateway_requests_running"
TOLD = "headgate_gateway_process_told"  # of several processes, whether a page tells of one
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
        """The sum over all gateways; None while it is not known of any of them.

        The page of one usually tells of all processes behind its port; else each is asked.
        """
        assert self._session is not None, "it is used outside of its `async with`"
        found: dict[str, float] = {}
        missing = False
        for page in self._pages:
            try:
                told = samples(await self._page(self._session, page))
            except (aiohttp.ClientError, TimeoutError):
                missing = True
                continue
            found |= told
            processes = [value for series, value in told.items() if series.startswith(TOLD)]
            if processes and all(processes):
                return demand(found)
        return None if missing else demand(found)

    async def _page(self, session: aiohttp.ClientSession, url: str) -> str:
        async with session.get(url) as response:
            response.raise_for_status()
            return await response.text()


def samples(page: str) -> dict[str, float]:
    """Of Prometheus text what counts here, by name and labels."""
    wanted = tuple(f"{name}{end}" for name in (QUEUED, RUNNING, TOLD) for end in " {")
    lines = (line.rpartition(" ") for line in page.splitlines() if line.startswith(wanted))
    return {series: float(value) for series, _, value in lines}


def demand(found: Mapping[str, float]) -> Demand:
    """By samples, whatever labels they have."""
    return Demand(_sum(found, QUEUED), _sum(found, RUNNING))


def _sum(found: Mapping[str, float], name: str) -> float:
    return sum(value for series, value in found.items() if series.partition("{")[0] == name)
