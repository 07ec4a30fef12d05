"""How much memory each configuration takes: started alone, asked a little, and looked at.

Knows what servers say of themselves at /metrics (`process_resident_memory_bytes`), gateway and
workers together; not what a device holds beside it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from evals.arms import Arm, Starting, series, started, summed
from evals.client import Client
from evals.execute import Prepared
from evals.item import Item

MEMORY_FILE = "memory.json"
_METRIC = "process_resident_memory_bytes"
_REQUESTS, _PROMPT_WORDS, _TOKENS = 8, 200, 32


async def measure_memory(plan: Prepared) -> None:
    """Writes what each arm takes into the run's folder; of one that does not tell, nothing."""
    alone = plan.hypothesis.design.model_copy(
        update={"aa_control": False, "sabotage_control": False}
    )
    hypothesis = plan.hypothesis.model_copy(update={"design": alone})
    with tempfile.TemporaryDirectory() as folder:
        async with started(Starting(hypothesis, plan.configured, Path(folder))) as arms:
            told = {name: await _resident(arm) for name, arm in arms.items()}
    found = {name: count for name, count in told.items() if count}
    (plan.folder / MEMORY_FILE).write_text(json.dumps(found), encoding="utf-8")


def read_memory(plan: Prepared) -> dict[str, int]:
    """Arm -> bytes, as far as they were told."""
    file = plan.folder / MEMORY_FILE
    found: dict[str, int] = json.loads(file.read_bytes()) if file.exists() else {}
    return found


async def _resident(arm: Arm) -> int:
    if arm.broken:
        return 0
    body: Mapping[str, object] = {
        "model": arm.model,
        "messages": [{"role": "user", "content": "word " * _PROMPT_WORDS}],
        "max_tokens": _TOKENS,
    }
    items = [Item(f"warm-{at}", f"warm-{at}", 0, body, None) for at in range(_REQUESTS)]
    async with Client(arm.url, arm.key) as client:
        await asyncio.gather(
            *(client.ask(item, arm.name, "memory", now=time.monotonic) for item in items)
        )
    return int(summed(await series(arm)).get(_METRIC, 0))
