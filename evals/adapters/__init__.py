"""Runs of other tools -> observations, so that two of them can be judged as a pair.

Knows their files; knows no statistics and no server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evals.adapters import aiperf, guidellm, inspect_ai, lm_eval, promptfoo
from evals.adapters.files import EmptyRun, NoRun, Run

__all__ = ["LOADS", "READERS", "EmptyRun", "NoRun", "Run"]

# Path, arm, and the field that rows are clustered by -> what was seen. Each raises NoRun.
Reader = Callable[[Path, str, str | None], Run]
READERS: Mapping[str, Reader] = {
    "inspect": inspect_ai.read,
    "lm-eval": lm_eval.read,
    "promptfoo": promptfoo.read,
    "guidellm": guidellm.read,
    "aiperf": aiperf.read,
}
# Tools that make load and say nothing of what is right.
LOADS = ("guidellm", "aiperf")
