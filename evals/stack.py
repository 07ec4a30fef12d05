"""Several hypotheses on one baseline, run together: the arms of a matrix, and their answers.

Knows files and arms; what the answers say, `matrix.py` knows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import arms
from evals.arms import Arm
from evals.design import Block, Step
from evals.journal import Journal
from evals.matrix import Matrix, arms_of, matrix, without
from evals.pairs import BASELINE, CANDIDATE
from evals.questions import asked_in
from evals.run import After, Bench, Source, run
from evals.sources import compared, read_sources
from policies.evidence import find_source
from policies.hypothesis import Hypothesis, Variant
from policies.load import load_hypothesis, read_yaml
from policies.patching import Configured, configured, variants
from policies.problems import PolicyError, Problem, dotted
from policies.side import canonical

# Starts an arm for each policy, alive until the context is left: `arms.beside`.
Start = Callable[[Mapping[str, Configured], Path], AbstractAsyncContextManager[Mapping[str, Arm]]]
_DIGEST_CHARS = 8


@dataclass(frozen=True, slots=True)
class Stack:
    """What a matrix is about to do, all of it checked. `policies`: by arm."""

    hypotheses: tuple[Hypothesis, ...]
    policies: Mapping[str, Configured]
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """Of the changes, and of everything that is asked of whom."""
        told = hashlib.sha256()
        for arm in sorted(self.policies):
            told.update(canonical([arm, self.policies[arm].data]))
        for source in self.sources:
            for block in source.blocks:
                asked = [[one.id, dict(one.body), one.expected] for one in block.items]
                told.update(canonical([source.name, block.number, asked]))
        names = "+".join(one.name for one in self.hypotheses)
        return f"{names[:96]}-{told.hexdigest()[:_DIGEST_CHARS]}"


def prepare(files: Sequence[Path]) -> Stack:
    """Reads all that the hypotheses name. Raises PolicyError: also where they do not share their
    baseline, change the same knob, or call different things by one name.
    """
    hypotheses = tuple(load_hypothesis(file) for file in files)
    first = hypotheses[0]
    bases = []
    for file, one in zip(files, hypotheses, strict=True):
        asked_in(file, one)
        base, other = variants(file, one)
        _check_stackable(file, one, base, other)
        assert base is not None
        bases.append(base)
    _check_together(files, hypotheses, bases)
    policies = {
        arm: _stacked(files, hypotheses, bases[0], arm)
        for arm in arms_of([one.name for one in hypotheses])
    }
    sources: dict[str, Source] = {}
    for file, one in zip(files, hypotheses, strict=True):
        alike = one.model_copy(update={"design": first.design, "stats": first.stats})
        for source in read_sources(file, alike):
            sources.setdefault(source.name, source)
    blocks = [block for source in sources.values() for block in source.blocks]
    steps = order(blocks, tuple(policies), first.stats.seed)
    return Stack(hypotheses, policies, tuple(sources.values()), steps)


async def execute(stack: Stack, folder: Path, start: Start, after: After) -> Matrix:
    """Runs what is left, and says what came of it. Raises JournalError."""
    with Journal(folder / "journal.jsonl") as journal:
        if any(step not in journal for step in stack.steps):
            async with start(stack.policies, folder / "arms") as found:
                await run(_bench(stack, found), stack.steps, journal, after)
        seen = await compared(stack.sources, tuple(journal.observations))
        return matrix(stack.hypotheses, seen)


def order(blocks: Sequence[Block], names: Sequence[str], seed: int) -> tuple[Step, ...]:
    """Every block in every arm, forwards and backwards in turn, so that what drifts does so to all
    arms alike. Which arm begins is drawn anew for every two blocks.
    """
    rng = random.Random(f"{seed}:matrix")  # noqa: S311  # repeatable
    found: list[Step] = []
    for at in range(0, len(blocks), 2):
        turn = list(names)
        rng.shuffle(turn)
        for block, arms_in_turn in zip(blocks[at : at + 2], (turn, turn[::-1]), strict=False):
            found += [Step(block, arm) for arm in arms_in_turn]
    return tuple(found)


def _bench(stack: Stack, found: Mapping[str, Arm]) -> Bench:
    targets = arms.targets(stack.policies[BASELINE])
    sources = {one.name: one for one in stack.sources}
    return Bench(stack.hypotheses[0], found, targets, sources)


def _check_stackable(
    file: Path, one: Hypothesis, base: Configured | None, other: Configured | None
) -> None:
    if base is None or other is None or not one.candidate.patch:
        said = "changes in a stack are patches of a policy"
        raise PolicyError(_problem(file, ("candidate",), said))
    if one.candidate.config not in (None, one.baseline.config):
        said = "a stack has one policy, which all its changes patch"
        raise PolicyError(_problem(file, ("candidate", "config"), said))


def _check_together(
    files: Sequence[Path], hypotheses: Sequence[Hypothesis], bases: Sequence[Configured]
) -> None:
    wrong = []
    taken: dict[str, Path] = {}
    named: dict[str, Path] = {}
    for file, one, base in zip(files, hypotheses, bases, strict=True):
        if base.data != bases[0].data:
            said = f"is not that of {files[0].name}: a stack has one baseline"
            wrong.append(_problem(file, ("baseline",), said))
        for path in one.candidate.patch:
            other = next((each for each in taken if _overlap(each, path)), None)
            if other is not None:
                said = f"{taken[other].name} changes it as well"
                wrong.append(_problem(file, ("candidate", "patch", path), said))
            taken[path] = file
        for source in one.sources:
            there = named.setdefault(source, find_source(source, file))
            if there != find_source(source, file):
                said = f"{source} is {there} for {files[0].name}"
                wrong.append(_problem(file, ("guardrails",), said))
    names = [one.name for one in hypotheses]
    if len(set(names)) < len(names):
        wrong.append(
            _problem(files[0], ("metadata", "name"), f"twice in one stack: {', '.join(names)}")
        )
    if wrong:
        raise PolicyError(*wrong)


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _stacked(
    files: Sequence[Path], hypotheses: Sequence[Hypothesis], base: Configured, arm: str
) -> Configured:
    patch: dict[str, Any] = {}
    for one in hypotheses:
        if arm not in (BASELINE, without(one.name)):
            patch |= one.candidate.patch
    return configured(base.file, base.data, files[0], CANDIDATE, Variant(patch=patch))


def _problem(file: Path, path: tuple[str | int, ...], message: str) -> Problem:
    _, places, _ = read_yaml(str(file))
    return Problem(str(file), message, places.of(path), dotted(path))
