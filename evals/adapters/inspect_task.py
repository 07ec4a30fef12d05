"""A task of inspect_ai as a suite: what it asks becomes rows, its scorers become ours where they do
the same, which is tried with answers that both score.

A task whose model is asked more than once for a sample, or with tools, is no suite and is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson

from evals.adapters.files import share
from evals.adapters.inspect_run import Program, Refused
from evals.adapters.inspect_scorers import Theirs, theirs, tries
from evals.dataset import Suite, load_suite
from evals.item import Item
from evals.scorers import score
from policies.suite import SUITE_NAME
from telemetry import Observation

TRIED_SAMPLES = 40
ROUNDED = 0.0051  # inspect_ai tells F1 by two digits
MARK = "headgate-try-"
# Of a request, what a row keeps: all but who is asked, and how the answer comes.
_NOT_KEPT = frozenset(("model", "stream", "stream_options", "user", "messages"))
_INSTEAD = (
    "run it with `inspect eval` against each server, and judge the two logs: "
    "headgate gate compare A.eval B.eval --from inspect"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample: what a model is asked for it, and what is right."""

    id: str
    body: Mapping[str, Any]
    targets: list[str]
    metadata: Mapping[str, Any]


@dataclass(slots=True)
class Agreement:
    """One scorer of the task, and how ours scored the same answers."""

    scorer: Theirs
    tried: int = 0
    right: int = 0
    against: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.scorer.ours) and self.tried > 0 and not self.against

    def told(self) -> str:
        kind = self.scorer.ours.get("kind")
        if kind is None:
            return "left out: there is no scorer of ours that does the same"
        if self.against:
            share_of = f"{len(self.against)} of {self.tried}"
            return f"left out: {kind} differs in {share_of} answers: {self.against[0]}"
        if not self.tried:
            return "left out: inspect scored no answer by it"
        return f"{kind}, which agreed in all of {self.tried} answers, {self.right} of them right"


@dataclass(frozen=True, slots=True)
class Taken:
    """A suite, still without a file."""

    name: str
    version: str
    rows: tuple[Asked, ...]
    epochs: int
    scorers: tuple[Agreement, ...]

    def write(self, folder: Path, cluster: str | None, task: str) -> Path:
        """The suite's file, with its rows beside it. Raises OSError, PolicyError, Refused."""
        kept = [one.scorer for one in self.scorers if one.holds]
        note = f"Made of inspect_ai's task {task} (inspect_ai {self.version})."
        return _write(folder, self.name, note, self.rows, kept, cluster)


async def take(program: Program, scratch: Path) -> Taken:
    """Runs the task twice: to hear what it asks, and to hear how it scores. Raises Refused."""
    rows, head = await _asked(program)
    said = head["eval"]
    name = re.sub(r"[^a-z0-9._-]+", "-", str(said["task"]).rpartition("/")[2].lower()).strip("-.")
    if not re.fullmatch(SUITE_NAME, name):
        name = "inspect"
    version = str((said.get("packages") or {}).get("inspect_ai", "unknown"))
    epochs = int((said.get("config") or {}).get("epochs") or 1)
    scorers = await _scorers(program, rows, name, scratch)
    return Taken(name, version, tuple(rows), epochs, tuple(scorers))


async def _asked(program: Program) -> tuple[list[Asked], Mapping[str, Any]]:
    bodies: list[Mapping[str, Any]] = []

    def answer(body: Mapping[str, Any]) -> str:
        bodies.append(body)
        return f"{MARK}{len(bodies) - 1}"

    log = await program.run(answer, score=False)
    rows = [_sample(one, bodies) for one in log["samples"]]
    if len(bodies) > len(rows):
        raise Refused(
            f"the task asks a model {len(bodies)} times for {len(rows)} samples, and a suite asks "
            f"once for each; {_INSTEAD}"
        )
    twice = [name for name, count in Counter(one.id for one in rows).items() if count > 1]
    if twice:
        raise Refused(f"sample {twice[0]} comes twice")
    return rows, log


def _sample(sample: Mapping[str, Any], bodies: Sequence[Mapping[str, Any]]) -> Asked:
    name = str(sample.get("id"))
    if sample.get("error"):
        raise Refused(f"sample {name}: {sample['error'].get('message')}")
    found = re.fullmatch(MARK + r"([0-9]+)", _completion(sample).strip())
    if found is None:
        raise Refused(f"sample {name}: what is scored is not what a model answered; {_INSTEAD}")
    body = bodies[int(found[1])]
    if body.get("tools"):
        raise Refused(f"sample {name} has tools, which inspect runs itself; {_INSTEAD}")
    target = sample.get("target")
    targets = [str(one) for one in target] if isinstance(target, list) else [str(target)]
    return Asked(name, body, targets, sample.get("metadata") or {})


def _completion(sample: Mapping[str, Any]) -> str:
    choices = (sample.get("output") or {}).get("choices") or [{}]
    content = (choices[0].get("message") or {}).get("content")
    if isinstance(content, list):
        return "".join(str(one.get("text", "")) for one in content if isinstance(one, dict))
    return content if isinstance(content, str) else ""


# ---- scorers ------------------------------------------------------------------------------------


async def _scorers(
    program: Program, rows: Sequence[Asked], name: str, scratch: Path
) -> list[Agreement]:
    """Those of the task, each tried on answers that it scores in the user's own inspect."""
    by_body = {_key(one.body): one for one in rows}
    waiting = {
        one.id: cycle(tries(one.targets, _wrong(rows, at))) for at, one in enumerate(rows)
    }  # the same answers in the same order, whichever epoch asks first

    def answer(body: Mapping[str, Any]) -> str:
        row = by_body.get(_key(body))
        return next(waiting[row.id]) if row is not None else "GRADE: I"

    epochs = len(tries(["a"], "b"))
    log = await program.run(answer, score=True, epochs=epochs, limit=min(len(rows), TRIED_SAMPLES))
    found = [Agreement(one) for one in theirs(log["eval"].get("scorers") or ())]
    mapped = [one for one in found if one.scorer.ours]
    if mapped:
        suite = load_suite(_write(scratch, name, "", rows, [one.scorer for one in mapped], None))
        known = {item.id: item for item in suite.items}
        for sample in log["samples"]:
            await _compare(suite, known.get(str(sample.get("id"))), sample, mapped)
    return found


async def _compare(
    suite: Suite, item: Item | None, sample: Mapping[str, Any], mapped: Sequence[Agreement]
) -> None:
    if item is None:
        return
    text = _completion(sample)
    ours = await score(
        suite, item, Observation(item.id, "suite:tried", "baseline", item.id, text=text)
    )
    for one in mapped:
        told = share(((sample.get("scores") or {}).get(one.scorer.name) or {}).get("value"))
        if told is None:
            continue
        one.tried += 1
        one.right += told == 1
        here = ours[one.scorer.metric]
        if abs(told - here) > ROUNDED:
            one.against.append(f"sample {item.id}, {text!r}: {told:g} there, {here:g} here")


def _wrong(rows: Sequence[Asked], at: int) -> str:
    """What is right for another sample and not for this one."""
    others = (one.targets[0] for one in (*rows[at + 1 :], *rows[:at]))
    return next((one for one in others if one not in rows[at].targets), "none of these")


def _key(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


# ---- a suite's file -----------------------------------------------------------------------------


def _write(
    folder: Path,
    name: str,
    note: str,
    rows: Sequence[Asked],
    scorers: Sequence[Theirs],
    cluster: str | None,
) -> Path:
    """Raises OSError, Refused, and PolicyError for a suite that is none."""
    lines = [json.dumps(_row(one, scorers, cluster), ensure_ascii=False) for one in rows]
    given = {
        "apiVersion": "headgate/v1",
        "kind": "Suite",
        "name": name,
        "note": note,
        "data": f"{name}.jsonl",
        **({"cluster": cluster} if cluster else {}),
        "scorers": [*(one.ours for one in scorers), {"kind": "bad_output"}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.write_text(json.dumps(given, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    load_suite(file)
    return file


def _row(one: Asked, scorers: Sequence[Theirs], cluster: str | None) -> dict[str, Any]:
    sent = {name: value for name, value in one.body.items() if name not in _NOT_KEPT}
    row = {
        "id": one.id,
        "messages": one.body["messages"],
        "expected": one.targets if len(one.targets) > 1 else one.targets[0],
        **sent,
    }
    for scorer in scorers:
        row |= scorer.row_fields(one.targets)
    if cluster is not None:
        if cluster not in one.metadata:
            there = ", ".join(one.metadata) or "nothing"
            raise Refused(f"sample {one.id}: its metadata has {there}, and not {cluster}")
        row[cluster] = str(one.metadata[cluster])
    return row
