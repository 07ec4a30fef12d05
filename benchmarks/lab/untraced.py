"""`python -m benchmarks.lab.untraced POLICY --port PORT`: the gateway as it would be if it noted no
moment of a request: no trail, no phases, no ids for replicas. To compare with, nothing else.
"""

from __future__ import annotations

import sys
from typing import Any

import gateway.admission
import gateway.listener
import gateway.reply
from gateway.__main__ import main
from gateway.tracing import Tracer


class Nowhere:
    """An interval that nobody asks for."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class Blank:
    """Takes what is noted of a request, and does nothing with it."""

    trim = prompt = Nowhere()

    def __init__(self, began: float) -> None:
        self.began = began

    def nothing(self, *_: Any) -> None: ...

    received = parsed = hop = whole = said = nothing


def _begin(_tracer: Tracer, _id: str, _path: str, _headers: Any, began: float, _read: float) -> Any:
    return Blank(began)


def untrace() -> None:
    """Parts of the gateway that note moments do nothing from now on, in this process."""
    told: Any = {
        Tracer: {"begin": _begin, "end": lambda *_: None, "exemplar": lambda *_: ""},
        gateway.reply: {"server_timing": lambda _: b"", "now": lambda: 0.0},
        gateway.admission: {"Interval": Nowhere},
        gateway.listener: {"Reader": lambda connection, *_: connection},
    }  # fmt: skip
    for where, names in told.items():
        for name, instead in names.items():
            setattr(where, name, instead)


if __name__ == "__main__":
    untrace()
    sys.exit(main())
