"""The menu: techniques, their sums, the hypotheses they become, and what is read of their runs."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evals.menu import Figures, Row, Workload, figures, hypothesis_of, pooled, refused, row_of
from evals.pairs import BASELINE, CANDIDATE
from evals.report.menu import HEADINGS, menu_page, terminal
from evals.techniques import NAMED, NoTechnique, combinations, technique
from evals.verdict import Finding, Side, Verdict
from policies.hypothesis import Hypothesis
from policies.patching import patched
from policies.schema import Deployment
from telemetry import Observation

HERE = Path()


@pytest.mark.parametrize("name", NAMED)
def test_every_named_technique_makes_a_policy_and_a_hypothesis_that_are_valid(name: str) -> None:
    one = technique(name, HERE)
    base = {"version": 1, "runtime": {"model": "pocket"}, "gateway": {}}
    Deployment.model_validate(patched(base, one.patch))
    workload = Workload(("qa",), ("week",))
    asked = Hypothesis.model_validate(hypothesis_of(one, "policy.yaml", workload))
    assert asked.kind_of_change == one.kind
    assert set(asked.sources) == {"suite:qa", "replay:week"}
    assert 1 <= one.complexity <= 5


def test_a_sum_has_all_knobs_and_the_kind_that_covers_them() -> None:
    both = technique("ngram+int8-kv", HERE)
    assert set(both.patch) == {"runtime.speculation", "runtime.kv"}
    assert both.kind == "lossy_model"
    assert both.complexity > max(technique(one, HERE).complexity for one in both.parts)
    assert technique("two-workers", HERE).kind == "routing_only"


def test_a_knob_and_its_value_can_be_tried_and_so_can_a_file(tmp_path: Path) -> None:
    assert technique("runtime.step_tokens=512", HERE).patch == {"runtime.step_tokens": 512}
    assert technique("runtime.kv=int8", HERE).patch == {"runtime.kv": "int8"}
    given = {
        **hypothesis_of(technique("w8a8", HERE), "policy.yaml", Workload(("qa",))),
        "metadata": {"name": "mine", "note": "as I have it"},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(given))
    mine = technique("mine.yaml", tmp_path)
    assert (mine.name, mine.said) == ("mine", "as I have it")
    assert mine.patch == {"runtime.weights": "w8a8"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("w8a9", "did you mean 'w8a8'"),
        ("something else", "there are w8a8"),
        ("runtime.kvv=int8", "did you mean 'runtime.kv'"),
        ("gateway.port=1", "is no knob"),
        ("w8a8+int4", "both set runtime.weights"),
        ("w8a8+trim", "no kind of change covers"),
    ],
)
def test_what_cannot_be_tried_is_said(asked: str, said: str) -> None:
    with pytest.raises(NoTechnique, match=said):
        technique(asked, HERE)


def test_combinations_leave_out_what_excludes_each_other() -> None:
    parts = [technique(name, HERE) for name in ("w8a8", "int4", "ngram", "int8-kv")]
    names = [one.name for one in combinations(parts)]
    assert names[0] == "w8a8+ngram" and "w8a8+ngram+int8-kv" in names
    assert not [name for name in names if "w8a8" in name and "int4" in name]


def seen(arm: str, at: int, e2e_s: float, **changed: object) -> Observation:
    made = Observation(
        f"q{at}", "suite:qa", arm, f"q{at}", block=at // 5, at_s=float(at), ttft_s=e2e_s / 4,
        tpot_s=e2e_s / 100, e2e_s=e2e_s, completion_tokens=50,
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


def test_tokens_a_second_are_those_of_the_time_in_which_the_arm_was_asked() -> None:
    """Blocks of five a second apart: the gap between blocks is another arm's time."""
    rows = [seen(BASELINE, at if at < 5 else at + 100, 1.0) for at in range(10)]
    rows = [replace(one, block=int(one.at_s > 50)) for one in rows]
    assert figures(rows).tokens_per_s == pytest.approx(500 / 10)
    broken = [replace(rows[0], outcome="error"), *rows[1:]]
    assert figures(broken).tokens_per_s == pytest.approx(450 / 10)


def test_a_failed_request_is_slower_than_any() -> None:
    rows = [seen(BASELINE, at, 1.0) for at in range(9)]
    failed = [seen(BASELINE, at, 1.0, outcome="timeout", ttft_s=None) for at in range(9, 20)]
    assert figures(rows).ttft_p95_s == 0.25
    assert figures([*rows, *failed]).ttft_p50_s is None


def a_row(name: str = "w8a8", price: float | None = None, decision: str = "pass") -> Row:
    """A candidate twice as fast that lost 9 and gained 4 of 1,000."""
    finding = Finding(
        "guardrail 1", "guardrail", "suite:qa", "correct", "all", "paired_ni", "tango",
        "difference", 1000, None, 9, 4, 0.9, 0.895, -0.005, -0.012, 0.003, -0.02, 0.05, 0.01,
        "pass",
    )  # fmt: skip
    side = Side("a", {})
    verdict = Verdict(
        name, decision, "", (), (finding,), (), side, side, side, 1.0, None,  # type: ignore[arg-type]
        "lossy_model", {}, {}, {},
    )  # fmt: skip
    rows = [seen(BASELINE, at, 1.0) for at in range(20)]
    rows += [seen(CANDIDATE, at, 0.5) for at in range(20)]
    memory = {BASELINE: 2 * 2**30, CANDIDATE: 2**30}
    return row_of(technique(name, HERE), verdict, rows, f"runs/{name}", memory, price)


def test_a_row_says_what_its_run_says() -> None:
    row = a_row()
    assert (row.pairs, row.lost, row.gained, row.margin) == (1000, 9, 4, -0.02)
    assert row.quality == (-0.012, -0.005, 0.003)
    assert row.figures.ttft_p50_s == 0.125 and row.baseline.ttft_p50_s == 0.25
    assert row.figures.memory_bytes == 2**30
    assert row.figures.cost is not None and row.figures.cost < 1 == row.baseline.cost
    assert json.loads(json.dumps(row.payload()))["name"] == "w8a8"


def test_a_price_makes_costs_of_a_million_tokens() -> None:
    row = a_row(price=3.6)
    assert row.figures.tokens_per_s is not None
    assert row.figures.cost == pytest.approx(0.001 / row.figures.tokens_per_s * 1e6)


def test_the_baseline_is_the_median_of_what_it_was_beside_each() -> None:
    rows = [
        replace(a_row(), baseline=Figures(ttft_p50_s=value, memory_bytes=memory))
        for value, memory in ((0.1, 5), (0.3, 7), (0.2, None))
    ]
    middle = pooled(rows)
    assert (middle.ttft_p50_s, middle.memory_bytes, middle.tpot_p50_s) == (0.2, 7, None)


def test_the_table_has_a_line_for_each_and_says_why() -> None:
    broken = refused(technique("draft", HERE), "no draft fits this model")
    lines = terminal([a_row(), a_row("ngram", decision="no_benefit"), broken], None)
    assert [line.split()[0] for line in lines[:5]] == [
        "technique", "baseline", "w8a8", "ngram", "draft"
    ]  # fmt: skip
    assert "\u221250\u00a0%" in lines[2] and "9/4 of 1,000" in lines[2] and "Pass" in lines[2]
    assert lines[4].endswith("refused") and "draft: no draft fits this model" in lines


class Cells(HTMLParser):
    """The table's cells, and the links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows = self.cells = 0
        self.links: list[str | None] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(name)
        self.rows += name == "tr"
        self.cells += name in ("th", "td")
        self.links += [value for key, value in attributes if key == "href"]


def test_the_page_has_every_row_and_leads_to_its_report(tmp_path: Path) -> None:
    run = replace(a_row(), run=str(tmp_path / "runs" / "w8a8"))
    hostile = refused(technique("runtime.kv=<script>alert(1)</script>", HERE), "<img src=x>")
    text = menu_page([run, hostile], "policy.yaml", "qa", None, 1.8e9, tmp_path / "menu")
    table = Cells(text)
    assert (table.rows, table.cells) == (4, 4 * len(HEADINGS))
    assert table.links == ["#table", "../runs/w8a8/report.html"]
    assert not table.names & {"script", "img"}
    assert "Speed against quality" in text
