"""What a gate will be able to show, before it spends anything: pairs needed against pairs there.

Pure: numbers of rows and of what is known of the noise in, a table out. Reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evals.needs import FINENESS, NEVER, Noise, Supply, needs, note
from evals.questions import Question, questions
from evals.stats.power import guardrail_power
from evals.strata import Reach, traces
from policies.hypothesis import Hypothesis, Stats

# Nothing varies, and each row is on its own: with fewer pairs than this takes, nothing can pass.
_CALM = Noise(flips=0.0, spread=0.0, rate=0.0, correlation=0.0, measured=True)


@dataclass(frozen=True, slots=True)
class Row:
    """A question of the hypothesis. `needed` and `there` count `what`; `testable` is the smallest
    bound that what is there can show; None: it can show none.
    """

    name: str
    bound: float
    what: str
    needed: int | None
    there: int
    testable: float | None
    enough: bool
    required: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """`power`: of each guardrail, so that all together have what the hypothesis asks for. `reach`:
    how many requests of each source the change touches; empty where it touches all, or none say.
    """

    hypothesis: str
    alpha: float
    power: float
    rows: tuple[Row, ...]
    reach: tuple[Reach, ...] = ()

    @property
    def refused(self) -> bool:
        """Some guardrail could not pass even if nothing is lost, or no request can be touched:
        nothing should be spent.
        """
        return self._idle or any(one.required and not one.enough for one in self.rows)

    @property
    def _idle(self) -> bool:
        return bool(self.reach) and all(one.touched == 0 for one in self.reach)

    def payload(self) -> dict[str, Any]:
        return {**asdict(self), "refused": self.refused}

    def table(self) -> str:
        """As people read it, the reason of a refusal last."""
        head = ("", "bound", "needed", "there", "testable")
        lines = [head, *(_cells(one) for one in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
                ]
            ).rstrip()
            for line in lines
        ]
        told = [one for one in self.rows if one.note and one not in self._hopeless]
        notes = [f"{one.name}: {one.note}" for one in told]
        touched = [f"touched in {one}" for one in self.reach]
        return "\n".join([*text, *notes, *touched, *self.warnings, *self._refusal()])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is no reason to refuse, and will not come out as hoped for."""
        return tuple(f"warning: {one.name} cannot be shown: {one.note}" for one in self._hopeless)

    @property
    def _hopeless(self) -> list[Row]:
        return [one for one in self.rows if not one.required and one.testable is None]

    def _refusal(self) -> list[str]:
        short = [one for one in self.rows if one.required and not one.enough]
        idle = ["refused: the change touches no request that would be asked"] * self._idle
        return idle + [
            f"refused: {one.name} cannot be shown: "
            + (
                f"{one.there:,} {one.what}"
                if one.needed is None
                else f"{one.needed:,} {one.what} needed, {one.there:,} there"
            )
            + (f"; testable is {_share(one.testable)}" if one.testable is not None else "")
            for one in short
        ]


def plan(
    hypothesis: Hypothesis,
    supplies: Mapping[str, Supply],
    noise: Mapping[str, Noise] | None = None,
    reach: Sequence[Reach] = (),
) -> Plan:
    """`supplies` by source; `noise` by question, from `measured`; `reach`: how many requests the
    change touches, as far as anybody knows. Raises Unanswerable.
    """
    asked = questions(hypothesis)
    stats = hypothesis.stats
    power = guardrail_power(stats.power, sum(one.kind == "guardrail" for one in asked))
    known = {one.source: one for one in reach} if traces(hypothesis) else {}
    rows = []
    for one in asked:
        supply = supplies.get(one.source, Supply(0, 0, 0))
        expected = (noise or {}).get(one.name, Noise(flips=stats.flips))
        rows.append(_row(one, supply, expected, stats, power))
        part = known.get(one.source)
        if part is not None and 0 < part.share < 1 and one.kind == "guardrail":
            least = hypothesis.validity.min_affected_pairs
            rows.append(_affected(one, supply, expected, stats, power, part, least))
    return Plan(hypothesis.name, stats.alpha, power, tuple(rows), tuple(known.values()))


def _row(question: Question, supply: Supply, noise: Noise, stats: Stats, power: float) -> Row:
    need = needs(question, supply, noise, stats, power)
    rail = question.kind == "guardrail"
    needed = _bounded(need.of, question.bound)
    return Row(
        name=question.name,
        bound=question.bound,
        what=need.what,
        needed=needed if rail else None,
        there=need.there,
        testable=need.testable,
        enough=not rail or (needed is not None and need.there >= needed),
        required=rail,
        note=note(question, supply, noise),
    )


def _affected(
    question: Question,
    supply: Supply,
    noise: Noise,
    stats: Stats,
    power: float,
    reach: Reach,
    least: int,
) -> Row:
    """The same over the requests that the change touches. What nobody asked to be planned for is
    refused only where it could not pass whatever comes.
    """
    rows = int(supply.rows * reach.share)
    crowd = reach.share * supply.crowd
    part = Supply(rows, min(supply.clusters, rows), supply.blocks, crowd)
    row = _row(question, part, noise, stats, power)
    firm = reach.told == "asked"
    best = _row(question, replace(part, clusters=rows), _CALM, stats, power)
    enough = row.needed is not None and _reaches(row if firm else best, least)
    most = "at most " if reach.told == "rows" else ""
    few = "" if firm or not enough or _reaches(row, least) else "; fewer than planned for"
    return replace(
        row,
        name=f"{row.name} [affected]",
        needed=None if row.needed is None else max(row.needed, _least(row, least)),
        enough=enough,
        note=f"{most}{reach.share:.0%} of the requests{few}",
    )


def _reaches(row: Row, least: int) -> bool:
    return row.enough and row.there >= _least(row, least)


def _least(row: Row, least: int) -> int:
    return least if row.what == "pairs" else 0


def _bounded(need: Callable[[float], int], bound: float) -> int | None:
    found = need(max(bound, FINENESS))
    return None if found >= NEVER else found


def _cells(row: Row) -> tuple[str, ...]:
    needed = "-" if not row.required else "never" if row.needed is None else f"{row.needed:,}"
    return (
        row.name,
        _share(row.bound),
        needed,
        f"{row.there:,} {row.what}",
        "-" if row.testable is None else _share(row.testable),
    )


def _share(value: float | None) -> str:
    return "nothing" if value is None else f"{100 * value:.3g} %"
