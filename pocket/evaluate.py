"""Greedy exact match of a model on the held-out split, task by task.

    python -m pocket.evaluate --model pocket/target
    python -m pocket.evaluate --model pocket/draft --against pocket/target --json

A row counts when the whole answer, every character of it, is the expected one. Rows come from
`pocket.tasks.rows(task, "test", seed, count)`, so that anybody can look at any of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from pocket.scoring import encode_row, forced_choices, generate
from pocket.tasks import TASKS, Row, rows

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Score:
    """How many of `rows` rows of a task were answered exactly."""

    task: str
    rows: int
    exact: int

    @property
    def share(self) -> float:
        return self.exact / self.rows

    @property
    def margin(self) -> float:
        """Half the width of the 95 % Wilson interval (Wilson 1927)."""
        z, n, p = 1.96, self.rows, self.share
        return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


@dataclass(frozen=True, slots=True)
class Miss:
    task: str
    index: int
    expected: str
    got: str


def load(folder: Path, dtype: str, device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} holds no config.json; expected a folder such as pocket/target")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype])
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps it untyped
    model.train(False)
    return model, AutoTokenizer.from_pretrained(folder)


def score(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    items: list[Row],
    batch_rows: int,
) -> tuple[Score, list[Miss]]:
    """The score of one task and every row that was missed."""
    misses = []
    for at in range(0, len(items), batch_rows):
        batch = items[at : at + batch_rows]
        for offset, got in enumerate(generate(model, tokenizer, batch)):
            if got != batch[offset].answer:
                misses.append(Miss(task, at + offset, batch[offset].answer, got))
    return Score(task, len(items), len(items) - len(misses)), misses


def agreement(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Row],
    batch_rows: int,
) -> tuple[int, int]:
    """Answer tokens where the first choices of both models agree, and answer tokens in all."""
    agreed = total = 0
    for at in range(0, len(items), batch_rows):
        encoded = [encode_row(tokenizer, item) for item in items[at : at + batch_rows]]
        prompts, answers = [p for p, _ in encoded], [a for _, a in encoded]
        ours = forced_choices(draft, prompts, answers)
        theirs = forced_choices(target, prompts, answers)
        for mine, other in zip(ours, theirs, strict=True):
            agreed += sum(a == b for a, b in zip(mine, other, strict=True))
            total += len(mine)
    return agreed, total


def report(scores: list[Score]) -> str:
    lines = [f"{'task':<10} {'rows':>5} {'exact':>6}  95 %"]
    lines += [f"{s.task:<10} {s.rows:>5} {s.share:>6.1%}  +-{s.margin:.1%}" for s in scores]
    mean = sum(one.share for one in scores) / len(scores)
    return "\n".join([*lines, f"{'average':<10} {sum(s.rows for s in scores):>5} {mean:>6.1%}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--against", type=Path, help="also count the tokens this model agrees on")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this one; repeatable")
    parser.add_argument("--rows", type=int, default=200, help="rows a task (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows (default 0)")
    parser.add_argument("--batch-rows", type=int, default=50)
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="to compute in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--misses", type=int, default=0, help="show this many misses a task")
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")
    options = parser.parse_args()
    if options.rows < 1 or options.batch_rows < 1:
        parser.error("--rows and --batch-rows have to be at least 1")
    return options


def main() -> None:
    options = parse()
    model, tokenizer = load(options.model, options.dtype, options.device)
    other = load(options.against, options.dtype, options.device)[0] if options.against else None
    scores: list[Score] = []
    missed: list[Miss] = []
    agreed = answered = 0
    for task in options.task or TASKS:
        began = time.monotonic()
        items = list(rows(task, "test", options.seed, options.rows))
        one, misses = score(model, tokenizer, task, items, options.batch_rows)
        scores.append(one)
        missed += misses[: options.misses]
        if other is not None:
            more = agreement(model, other, tokenizer, items, options.batch_rows)
            agreed, answered = agreed + more[0], answered + more[1]
        if not options.json:
            print(f"{task}: {one.share:.1%} in {time.monotonic() - began:.1f} s", flush=True)
    result = {
        "model": str(options.model),
        "seed": options.seed,
        "tasks": {one.task: {**asdict(one), "share": one.share} for one in scores},
        "average": sum(one.share for one in scores) / len(scores),
        "agreement": agreed / answered if answered else None,
        "misses": [asdict(miss) for miss in missed],
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print("\n" + report(scores))
    if answered:
        print(f"same first choice as {options.against}: {agreed / answered:.1%} of {answered}")
    for miss in missed:
        print(f"{miss.task} {miss.index}: expected {miss.expected!r}, got {miss.got!r}")


if __name__ == "__main__":
    main()
