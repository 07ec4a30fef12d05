"""What a gate will be able to show, before it spends anything: pairs needed against pairs there.

Pure: numbers of rows and of what is known of the noise in, a table out. Reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evals.needs import FINENESS, NEVER, Noise, Supply, needs, note
from evals.questions import Question, questions
from evals.stats.power import guardrail_power
from evals.strata import traces
from policies.hypothesis import Hypothesis, Stats


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
    """`power`: of each guardrail, so that all together have what the hypothesis asks for."""

    hypothesis: str
    alpha: float
    power: float
    rows: tuple[Row, ...]

    @property
    def refused(self) -> bool:
        """Some guardrail could not pass even if nothing is lost: nothing should be spent."""
        return any(one.required and not one.enough for one in self.rows)

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
        notes = [f"{one.name}: {one.note}" for one in self.rows if one.note]
        return "\n".join([*text, *notes, *self._refusal()])

    def _refusal(self) -> list[str]:
        short = [one for one in self.rows if one.required and not one.enough]
        return [
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
    exposed: float = 1.0,
) -> Plan:
    """`supplies` by source; `noise` by question, from `measured`; `exposed`: share of the requests
    that the change will touch. Raises Unanswerable.
    """
    asked = questions(hypothesis)
    stats = hypothesis.stats
    power = guardrail_power(stats.power, sum(one.kind == "guardrail" for one in asked))
    touched = exposed if traces(hypothesis) else 1.0
    rows = []
    for one in asked:
        supply = supplies.get(one.source, Supply(0, 0, 0))
        known = (noise or {}).get(one.name, Noise(flips=stats.flips))
        rows.append(_row(one, supply, known, stats, power))
        if touched < 1 and one.kind == "guardrail":
            least = hypothesis.validity.min_affected_pairs
            rows.append(_affected(one, supply, known, stats, power, touched, least))
    return Plan(hypothesis.name, stats.alpha, power, tuple(rows))


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
    share: float,
    least: int,
) -> Row:
    """The same over the requests that the change will touch."""
    rows = int(supply.rows * share)
    part = Supply(rows, min(supply.clusters, rows), supply.blocks, share * supply.crowd)
    row = _row(question, part, noise, stats, power)
    needed = None if row.needed is None else max(row.needed, least if row.what == "pairs" else 0)
    enough = needed is not None and row.there >= needed
    return Row(
        name=f"{row.name} [affected]",
        bound=row.bound,
        what=row.what,
        needed=needed,
        there=row.there,
        testable=row.testable,
        enough=enough,
        required=True,
        note=f"{share:.0%} of the requests",
    )


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
