"""Dashboards as values, and the JSON that Grafana reads. Knows no metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
HEIGHT = 8
PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}
WINDOW = "$__rate_interval"

Kind = Literal["timeseries", "stat", "table", "bargauge"]


@dataclass(frozen=True, slots=True)
class Query:
    """`expr` is PromQL with `$W` for the window that suits the picture; `legend` of its labels."""

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `why`: what to see in it, and what to do."""

    title: str
    why: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False
    at_most: float | None = None  # of the axis
    warns_at: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """What a reader chooses, one or several values of a label, or all; `{label=~"$label"}`."""

    label: str
    metric: str  # whose series have the values


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    what: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = ()

    def json(self) -> dict[str, Any]:
        """As Grafana imports it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.what,
            "tags": ["headgate"],
            "schemaVersion": 41,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "5s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Headgate",
                    "tags": ["headgate"],
                    "asDropdown": True,
                }
            ],
            "templating": {"list": [_variable(one) for one in self.variables]},
            "annotations": {"list": []},
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[dict[str, Any]]:
        number, top = 1, 0
        for row in self.rows:
            place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
            yield {
                "id": number, "type": "row", "title": row.title, "collapsed": False,
                "gridPos": place, "panels": [],
            }  # fmt: skip
            number, top, left = number + 1, top + 1, 0
            for panel in row.panels:
                if left + panel.width > COLUMNS:
                    left, top = 0, top + HEIGHT
                place = {"h": HEIGHT, "w": panel.width, "x": left, "y": top}
                yield {"id": number, "gridPos": place, **_body(panel)}
                number, left = number + 1, left + panel.width
            top += HEIGHT


def _variable(one: Variable) -> dict[str, Any]:
    asked = f"label_values({one.metric}, {one.label})"
    return {
        "name": one.label,
        "label": one.label.capitalize(),
        "type": "query",
        "datasource": PROMETHEUS,
        "definition": asked,
        "query": {"query": asked, "refId": "values"},
        "refresh": 2,  # as the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _body(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": "none yet"}
    if panel.at_most is not None:
        defaults["max"] = panel.at_most
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.warns_at is not None:
        steps.append({"color": "red", "value": panel.warns_at})
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 60 if panel.stacked else 8,
            "showPoints": "never",
            "spanNulls": True,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.warns_at is None else "line"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.why,
        "datasource": PROMETHEUS,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
        "targets": [_target(panel, at, query) for at, query in enumerate(panel.queries)],
    }


def _options(kind: Kind) -> dict[str, Any]:
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if kind == "table":
        return {"showHeader": True, "cellHeight": "sm"}
    return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}


def _target(panel: Panel, at: int, query: Query) -> dict[str, Any]:
    return {
        "refId": "ABCDEFGH"[at],
        "datasource": PROMETHEUS,
        "expr": query.expr.replace("$W", WINDOW),
        "legendFormat": query.legend or "__auto",
        "exemplar": query.exemplars,
        "instant": panel.kind != "timeseries",
        "range": panel.kind == "timeseries",
        "format": "table" if panel.kind == "table" else "time_series",
    }
