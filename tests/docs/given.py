"""What pages say that their reader has already: a model, runs of another tool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LM_RUNS = ROOT / "tests" / "evals" / "runs" / "lm-base"


def _link(target: Path) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    return make


def _lm_eval(worse: int) -> Callable[[Path], None]:
    """400 rows as lm-eval writes them: a tenth is wrong, and `worse` more of each hundred."""

    def make(path: Path) -> None:
        path.mkdir(parents=True)
        template = json.loads(next(LM_RUNS.iterdir()).read_text().split("\n")[0])
        right = [at % 10 > 0 and not 10 < at % 100 <= 10 + worse for at in range(400)]
        rows = [
            {**template, "doc_id": at, "exact_match": float(one)} for at, one in enumerate(right)
        ]
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (path / "samples_support_2026-11-26T08-40-02.485776.jsonl").write_text(text)

    return make


GIVEN: dict[str, Callable[[Path], None]] = {
    "models/mine": _link(ROOT / "pocket" / "target"),
    "deploy": _link(ROOT / "deploy"),
    "examples": _link(ROOT / "examples"),
    "logs/base": _lm_eval(0),
    "logs/int8": _lm_eval(3),
}
