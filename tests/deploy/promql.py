"""What PromQL asks for: the series of an expression, and the labels that it takes them to have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser

WINDOW = "$__rate_interval"  # Grafana fills it in
CHOSEN = re.compile(r'"\$(\w+)"')  # a variable of the dashboard, of which all may be chosen

# By operator, whether a label's value is one that is asked for.
MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "MatchOp.Equal": lambda label, value: label == value,
    "MatchOp.NotEqual": lambda label, value: label != value,
    "MatchOp.Re": lambda label, value: bool(re.fullmatch(value, label)),
    "MatchOp.NotRe": lambda label, value: not re.fullmatch(value, label),
}


@dataclass(frozen=True)
class Wanted:
    name: str
    labels: frozenset[str]
    values: tuple[tuple[str, str, str], ...]  # label, operator, value

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Whether a series of its name is one that is asked for."""
        return self.labels <= labels.keys() and all(
            MATCHES[operator](labels[label], value) for label, operator, value in self.values
        )


def wanted(expr: str) -> list[Wanted]:
    """Raises ValueError for what no Prometheus would read."""
    filled = CHOSEN.sub('".*"', expr.replace(WINDOW, "5m"))
    return list(_below(promql_parser.parse(filled), frozenset()))


def _below(expr: Any, grouped: frozenset[str]) -> Iterator[Wanted]:
    if isinstance(expr, promql_parser.VectorSelector):
        found = [(one.name, str(one.op), one.value) for one in expr.matchers.matchers]
        labels = grouped | {name for name, _, _ in found}
        yield Wanted(expr.name, labels, tuple(found))
    elif isinstance(expr, promql_parser.MatrixSelector):
        yield from _below(expr.vector_selector, grouped)
    elif isinstance(expr, promql_parser.AggregateExpr):
        by = expr.modifier.labels if expr.modifier is not None else []
        yield from _below(expr.expr, frozenset(by))
    elif isinstance(expr, promql_parser.BinaryExpr):
        yield from _below(expr.lhs, grouped)
        yield from _below(expr.rhs, grouped)
    elif isinstance(expr, promql_parser.Call):
        for argument in expr.args:
            yield from _below(argument, grouped)
    elif hasattr(expr, "expr"):  # in brackets, negated, a subquery
        yield from _below(expr.expr, grouped)
