"""Answers that are code, run with a row's tests: right where all of them hold.

A row expects the tests' source. Where it has an `entry_point`, the tests define `check`, as
HumanEval's do, and it is called with that function. Its `prefix` goes in front of an answer that
only goes on with it.
"""

from __future__ import annotations

import re

from evals.dataset import value_of
from evals.item import Item
from evals.scorers.sandbox import Limits, run_python
from policies.suite import Scorer
from telemetry import Observation

_FENCE = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


async def passes(scorer: Scorer, item: Item, seen: Observation) -> float:
    limits = Limits(seconds=scorer.timeout, memory_bytes=scorer.memory_mb * 2**20)
    done = await run_python(program(scorer, item, seen.text), limits)
    return float(done.passed)


def program(scorer: Scorer, item: Item, text: str) -> str:
    """Answer, tests, and the call of them."""
    fenced = _FENCE.findall(text)
    code = "\n\n".join(fenced) if fenced else text
    entry, prefix = str(item.meta.get("entry_point", "")), str(item.meta.get("prefix", ""))
    if prefix and not (entry and re.search(rf"^(?:async )?def {entry}\b", code, re.MULTILINE)):
        code = prefix + code
    tests = str(value_of(item, scorer.field))
    call = f"\ncheck({entry})\n" if entry else "\n"
    return f"{code}\n\n{tests}\n{call}"
