"""One replica as the fleet knows it, at one moment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

PREFIX = "replica-"

State = Literal["placing", "starting", "ready", "draining"]


@dataclass(slots=True, eq=False)
class Unit:
    """A replica as the fleet knows it."""

    number: int
    began_at: float
    state: State = "placing"
    domain: str | None = None
    url: str | None = None
    busy: int = 0  # answers under way
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.number}"

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "url": self.url,
            "domain": self.domain,
            "running": self.busy,
        }
