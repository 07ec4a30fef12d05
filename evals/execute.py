"""One gate, from a hypothesis in a file to a verdict on disk: prepared, run, judged, recorded.

The life of `headgate gate run` in a few paragraphs; each step's how stands in its own module.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from evals import arms
from evals.activation import refuse_uncounted
from evals.arms import Arm, InTurn, Starting, started
from evals.controls import Facts
from evals.design import Step, steps
from evals.journal import Journal
from evals.keys import refuse_keyless
from evals.needs import supply_of
from evals.pairs import CANDIDATE
from evals.plan import Plan as Outlook, plan as outlook
from evals.progress import Progress
from evals.questions import Unanswerable
from evals.reach import of_rows
from evals.replay import Lateness
from evals.report.files import write_reports
from evals.run import Bench, Source, run
from evals.sources import compared, read_sources
from evals.verdict import Side, Verdict
from evals.verdict_file import VERDICT_FILE, Rows, write_run
from policies.binding import ledger_of, pair, sides
from policies.hypothesis import Hypothesis
from policies.ledger import Ledger
from policies.load import load_hypothesis
from policies.patching import Configured, spelled_out

STATE = ".headgate"  # beside the hypothesis
SPEC_FILE, JOURNAL_FILE, ARMS_FILE = "spec.json", "journal.jsonl", "arms.json"
_ROOT_DIGITS = 8
_VERSIONED = ("headgate", "torch", "transformers", "numpy", "scipy")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run is about to do, all of it checked; nothing has been started yet."""

    hypothesis: Hypothesis
    configured: tuple[Configured | None, ...]
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    sides: tuple[Side, Side]
    spec: Side
    state: Path
    ledger: Ledger

    @property
    def folder(self) -> Path:
        """Of this run: by the hypothesis's name, and by what is asked."""
        name = f"{self.hypothesis.name}-{self.spec.root[:_ROOT_DIGITS]}"
        return self.state / "runs" / name

    @property
    def outlook(self) -> Outlook:
        """What so many rows can show. Raises Unanswerable."""
        supplies = {one.name: supply_of(one.blocks) for one in self.sources}
        reach = of_rows(self.hypothesis, self.configured, self.sources)
        return outlook(self.hypothesis, supplies, reach=reach)


def prepare(file: Path, *, allow_code: bool = False) -> Prepared:
    """Reads everything that a hypothesis names. Raises PolicyError, binding.Unknown.

    `allow_code`: whether scorers may run what a model wrote.
    """
    written = load_hypothesis(file)
    configured = pair(file, written)
    refuse_keyless(file, written, configured)
    refuse_uncounted(file, written, configured[1])
    hypothesis = spelled_out(written, configured)
    sources = read_sources(file, hypothesis, allow_code=allow_code)
    blocks = [block for source in sources for block in source.blocks]
    baseline, candidate, spec = sides(file, written)
    return Prepared(
        hypothesis=hypothesis,
        configured=configured,
        sources=sources,
        steps=steps(blocks, hypothesis.design, hypothesis.stats),
        sides=(_side(baseline), _side(candidate)),
        spec=_side(spec),
        state=file.absolute().parent / STATE,
        ledger=ledger_of(file, hypothesis),
    )


async def execute(plan: Prepared, say: Say, progress: Progress) -> Verdict:
    """Runs what is left of the plan, judges, and records the verdict. Raises JournalError, and
    Unanswerable for a counter that the candidate does not have: of a run that has asked nothing
    that counts, nothing stays.
    """
    folder = _folder(plan, say)
    with Journal(folder / JOURNAL_FILE) as journal:
        if any(step not in journal for step in plan.steps):
            try:
                await _run(plan, folder, journal, say, progress)
            except Unanswerable:
                if not journal.done:
                    shutil.rmtree(folder)
                raise
        told = _told_arms(folder)
        rows = Rows(
            hypothesis=plan.hypothesis,
            observations=await compared(plan.sources, tuple(journal.observations)),
            sides=plan.sides,
            spec=plan.spec,
            now=time.time(),
            facts=_facts(plan, journal, told),
        )
        verdict = write_run(folder, rows)
    plan.ledger.record_verdict(verdict.payload())
    write_reports(folder, verdict, rows.observations)
    return verdict


async def _run(
    plan: Prepared, folder: Path, journal: Journal, say: Say, progress: Progress
) -> None:
    in_turn = plan.hypothesis.design.servers == "in_turn"
    say(f"starting {_arms_of(plan.hypothesis)}" + (", one at a time" if in_turn else ""))
    starting = Starting(plan.hypothesis, plan.configured, folder / "arms", say)
    if starting.caches_live_on and plan.configured[0] is None and len(starting.names) > 2:
        say(
            "note: the controls ask the baseline's own server, where caches live on from block to "
            "block: it finds there what they have asked. Set design.aa_control and "
            "design.sabotage_control to false, or have it served here (baseline.config)"
        )
    targets = arms.targets(plan.configured[0])
    sources = {one.name: one for one in plan.sources}
    known: dict[str, Arm] = {}

    def tell(arm: Arm) -> None:
        if known.get(arm.name) is None or arm.broken:
            say(f"  {arm.name:<10}{arm.url or 'does not run'}  {', '.join(arm.fingerprints)}")
            if arm.broken:
                say(f"    {arm.broken}")
        known[arm.name] = arm
        _write_arms(folder, known)

    async with contextlib.AsyncExitStack() as stack:
        if in_turn:
            turns = await stack.enter_async_context(InTurn(starting, tell))
            bench = Bench(plan.hypothesis, {}, targets, sources, turns.start)
        else:
            found = await stack.enter_async_context(started(starting))
            for arm in found.values():
                tell(arm)
            bench = Bench(plan.hypothesis, found, targets, sources)
        progress.begin(plan.steps, journal)
        stopped = await run(bench, plan.steps, journal, progress.after)
        progress.end()
        if stopped:
            say(f"stopped early: {stopped}")


def _folder(plan: Prepared, say: Say) -> Path:
    """The run's folder, with what it is about. One that is complete, or of other sides, is moved
    aside; one that was interrupted goes on.
    """
    folder = plan.folder
    content = orjson.dumps(
        {
            "hypothesis": plan.hypothesis.model_dump(mode="json"),
            "sides": [asdict(side) for side in plan.sides],
            "spec": asdict(plan.spec),
            "steps": len(plan.steps),
        },
        option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS,
    )
    spec = folder / SPEC_FILE
    if spec.exists():
        same = spec.read_bytes() == content
        if same and not (folder / VERDICT_FILE).exists():
            say(f"going on with {folder}")
            return folder
        aside = _free(folder)
        folder.rename(aside)
        say(f"the run before is kept in {aside.name}" + ("" if same else ": it compared others"))
    folder.mkdir(parents=True, exist_ok=True)
    spec.write_bytes(content)
    return folder


def _free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def _arms_of(hypothesis: Hypothesis) -> str:
    design = hypothesis.design
    controls = [
        name
        for name, wanted in (
            ("the baseline again", design.aa_control),
            ("a spoiled baseline", design.sabotage_control),
        )
        if wanted
    ]
    return ", ".join(["baseline", "candidate", *controls])


def _write_arms(folder: Path, found: Mapping[str, Arm]) -> None:
    """Beside those that a run before this one has told, which may have had others."""
    told = {name: list(prints) for name, prints in _told_arms(folder).items()}
    told |= {name: list(arm.fingerprints) for name, arm in found.items()}
    (folder / ARMS_FILE).write_bytes(orjson.dumps(told))


def _told_arms(folder: Path) -> dict[str, tuple[str, ...]]:
    file = folder / ARMS_FILE
    told: Mapping[str, Sequence[str]] = orjson.loads(file.read_bytes()) if file.exists() else {}
    return {name: tuple(prints) for name, prints in told.items() if prints}


def _facts(plan: Prepared, journal: Journal, told: Mapping[str, tuple[str, ...]]) -> Facts:
    """What the run knows beside its observations."""
    risen: dict[str, float] = {}
    for one in journal.done:
        if one.arm == CANDIDATE:
            for name, growth in one.counters.items():
                risen[name] = risen.get(name, 0.0) + growth
    return Facts(
        activation=risen,
        fingerprints=told,
        generator=_generator(journal),
        design=_design(plan, journal),
        versions=_versions(),
    )


def _generator(journal: Journal) -> str:
    """Why the load was not the one that was recorded, "" where it was."""
    late = Lateness([late for one in journal.done for late in one.late_s])
    if not late.saturated:
        return ""
    return (
        f"{late.late_share:.1%} of recorded requests were sent too late, the worst by "
        f"{late.quantile(1.0):.2f} s: play them slower (design.speed)"
    )


def _design(plan: Prepared, journal: Journal) -> dict[str, Any]:
    return {
        "blocks": {source.name: len(source.blocks) for source in plan.sources},
        "blocks_done": len(journal.done),
        "took_s": round(sum(one.took_s for one in journal.done), 3),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _side(side: Any) -> Side:
    return Side(side.root, dict(side.leaves))
