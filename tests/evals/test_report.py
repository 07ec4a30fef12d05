"""Reports say what a verdict says, in every form, and show answers without obeying them."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args, get_type_hints
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given, settings, strategies as st

from evals.pairs import Pair
from evals.report.answers import difference, judged, paired, worst
from evals.report.checks import found
from evals.report.divergence import first_difference, survival
from evals.report.evidence import chance, differences
from evals.report.files import NAMES, write_reports
from evals.report.junit import junit
from evals.report.latency import block_ratios
from evals.report.markdown import fenced, markdown, plain
from evals.report.markup import tag, visible
from evals.report.page import page
from evals.report.plot import Axis
from evals.report.scale import harm
from evals.report.words import figure, interval, limit
from evals.stats.power import pairs_needed
from evals.verdict import Control, Decision, Finding, Side, Verdict
from telemetry import Observation

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></pre></details>]]>&lt; "
    "\x1b[31mred\x1b[0m\x00 \u202ereversed @everyone [x](http://evil.example) ![y](//evil.example)"
    "\n```\n````\n<svg onload=alert(1)>"
)
DECISIONS: tuple[Decision, ...] = ("pass", "fail", "inconclusive", "invalid", "no_benefit")


def finding(**changed: object) -> Finding:
    """A guardrail: 41 lost and 12 gained of 1,000, two points may be lost."""
    plain_one = Finding(
        "guardrail 1", "guardrail", "suite:qa", "correct", "all", "paired_ni", "tango",
        "difference", 1000, None, 41, 12, 0.9, 0.871, -0.029, -0.041, -0.017, -0.02, 0.05, 0.6,
        "inconclusive", "underpowered", 0.021, 1700,
    )  # fmt: skip
    return replace(plain_one, **changed)  # type: ignore[arg-type]


def verdict(decision: Decision = "fail", *findings: Finding, **changed: object) -> Verdict:
    before = Side("b" * 64, {"weights": "1" * 64, "engine": "2" * 64})
    after = Side("c" * 64, {"weights": "3" * 64, "engine": "2" * 64})
    made = Verdict(
        "w8a8-support", decision, "", ("41 answers were lost",), findings or (finding(),),
        (Control("aa", ok=True, said="2 of 1,000 flipped"), Control("generator", ok=False)),
        before, after, Side("d" * 64, {"hypothesis": "4" * 64}), 1_790_000_000.0, None,
        "lossy_model", {"order": "abba"}, {"alpha": 0.05, "power": 0.8}, {"headgate": "0.1.0"},
        "5" * 64,
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


def run(count: int = 60, text: str = "the parcel is late") -> list[Observation]:
    """Three arms, blocks of ten; the candidate loses every twelfth answer and is 10 % slower."""
    rows = []
    for at in range(count):
        for arm in ("baseline", "candidate", "aa"):
            lost = arm == "candidate" and at % 12 == 5
            slower = 1.1 if arm == "candidate" else 1.0
            rows.append(
                Observation(
                    f"q-{at}", "suite:qa", arm, f"c-{at // 2}", block=at // 10, at_s=float(at),
                    ttft_s=slower * (0.1 + at % 7 / 100), tpot_s=slower * 0.01,
                    text="lost " + text if lost else text, token_ids=(1, 9 if lost else 2, 3),
                    scores={"correct": 0.0 if lost else 1.0},
                )
            )  # fmt: skip
    return rows


def printed(text: str) -> str:
    """As print has it: a true minus, and spaces that do not break."""
    return text.replace("-", "\u2212").replace(" ", "\u00a0")


class Outline(HTMLParser):
    """Elements and attributes as a browser would see them, and whether all are closed."""

    VOID = ("br", "hr", "img", "input", "link", "meta")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    """No script, no address of anything outside, and a policy that forbids both."""
    text = page(verdict(), run())
    outline = Outline(text)
    names = {name for name, _ in outline.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in outline.seen:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for _, a in outline.seen if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_a_page_has_every_picture_of_a_full_run() -> None:
    time = finding(
        name="guardrail 2", metric="ttft.p95", test="ratio_ni", method="block_t", unit="ratio",
        lost=None, gained=None, estimate=1.1, low=1.08, high=1.12, margin=1.15, decision="pass",
    )  # fmt: skip
    claim = replace(time, name="claim 1", kind="claim", test="superiority", margin=0.92)
    outline = Outline(page(verdict("fail", finding(), time, claim), run()))
    labels = [a["aria-label"] or "" for _, a in outline.seen if a.get("role") == "img"]
    for wanted in (
        "qa correct: \u22122.9", "qa ttft.p95: +10.0", "qa correct: 5 lost", "time to first token",
        "Ratio by block", "evidence as it grew", "what could have been shown", "diverged",
    ):  # fmt: skip
        assert [label for label in labels if wanted in label], wanted
    assert "1 part differs, 1 are the same" in outline.words


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_page_says_the_decision_in_words(decision: Decision) -> None:
    """Also without rows: a verdict alone can be shown."""
    outline = Outline(page(verdict(decision, reason="aa_failed")))
    assert decision.replace("_", " ").capitalize() in outline.words
    assert "aa failed" in outline.words


def test_hostile_answers_stay_text() -> None:
    """Every place that shows what a model, a server or a data set said."""
    rows = [
        replace(row, id=row.id + HOSTILE, cluster=HOSTILE + row.cluster, problem=HOSTILE,
                finish_reason=HOSTILE, scores={**row.scores, HOSTILE: 1.0},
                outcome="error" if row.id == "q-5" and row.arm == "candidate" else "ok")
        for row in run(text=HOSTILE)
    ]  # fmt: skip
    hostile = verdict(
        "fail", finding(), hypothesis=HOSTILE, reasons=(HOSTILE,),
        controls=(Control("aa", ok=True, said=HOSTILE),), versions={HOSTILE: HOSTILE},
        spec=Side(HOSTILE, {HOSTILE: HOSTILE}),
    )  # fmt: skip
    text = page(hostile, rows)
    outline = Outline(text)
    assert not {name for name, _ in outline.seen} & {"script", "img", "a x"}
    assert not [a for _, a in outline.seen if any(name.startswith("on") for name in a)]
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    assert "<script>alert(1)</script>" in outline.words
    suite = Xml.fromstring(junit(hostile))
    assert suite.find("testsuite") is not None


def test_hostile_answers_neither_link_nor_mention_in_markdown() -> None:
    """Answers stand in fences that they cannot close; names are escaped."""
    text = markdown(verdict(hypothesis=HOSTILE, reasons=(HOSTILE,)), run(text=HOSTILE))
    outside, fence = [], ""
    for line in text.splitlines():
        if not fence and (match := re.match(r"(`{3,})text$", line)):
            fence = match[1]
        elif line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert not fence
    told = "\n".join(outside)
    assert "@everyone" not in told and "](http" not in told and "<script" not in told
    assert set(re.findall(r"</?([a-z]+)", told)) <= {"details", "summary", "sub", "br"}
    assert len(text) < 65_536


@given(st.text(max_size=80))
def test_text_comes_back_from_markup_as_what_is_visible_of_it(text: str) -> None:
    outline = Outline(tag("p", text, title=text))
    assert outline.words == visible(text)
    assert outline.seen == [("p", {"title": visible(text)})]


@given(st.text(alphabet="`a\n", max_size=40))
def test_a_fence_is_longer_than_any_in_it(text: str) -> None:
    first, *_, last = fenced(text).split("\n")
    assert first == last + "text"
    assert last not in text


@given(st.text(max_size=60))
def test_a_plain_line_is_one_line_without_marks(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    assert not set(re.sub(r"&#\d+;", "", shown)) & set("`*[]<>|@~#$")


def test_junit_counts_what_it_holds() -> None:
    """A failure fails, an inconclusive finding is skipped, a broken control is an error."""
    findings = (finding(decision="fail"), finding(), finding(decision="pass"))
    root = Xml.fromstring(junit(verdict("fail", *findings)))
    counts = {
        name: int(root.get(name, "-1")) for name in ("tests", "failures", "errors", "skipped")
    }
    assert counts == {"tests": 6, "failures": 2, "errors": 1, "skipped": 1}
    cases = root.findall("testsuite/testcase")
    assert [case.get("name") for case in cases][:2] == ["verdict", "guardrail 1 [all]"]
    told = {one.get("name"): one.get("value") for one in cases[2].iter("property")}
    assert told["reason"] == "underpowered" and told["pairs_needed"] == "1700"


def test_in_an_invalid_run_no_finding_is_a_failure() -> None:
    """Nothing follows from it, in either direction: all of it is an error."""
    root = Xml.fromstring(junit(verdict("invalid", finding(decision="fail"), finding())))
    assert root.get("failures") == "0" and root.get("skipped") == "0"
    assert root.get("errors") == "4"


def test_figures_have_their_unit_and_a_true_minus() -> None:
    assert figure(finding(), -0.0294) == printed("-2.9 pp")
    assert figure(finding(unit="ratio"), 0.853) == printed("-14.7 %")
    assert figure(finding(unit="share", metric="bad_output"), 0.0021) == printed("0.21 %")
    assert figure(finding(unit="share", metric="kl"), 0.0125) == "0.01"
    assert figure(finding(), None) == "\u2013"
    assert interval(finding()) == printed("-4.1 … -1.7 pp")


def test_a_limit_points_where_harm_is() -> None:
    """Accuracy must stay above, latency below, a claim of speed must come out below."""
    assert limit(finding()) == "> " + printed("-2.0 pp")
    assert limit(finding(unit="ratio", margin=1.1, metric="ttft.p95")) == "< " + printed("+10.0 %")
    claim = finding(unit="ratio", margin=0.92, kind="claim", metric="tpot.p50")
    assert limit(claim) == "< " + printed("-8.0 %")
    faster = finding(unit="ratio", margin=1.08, kind="claim", metric="throughput")
    assert limit(faster) == "> " + printed("+8.0 %")
    assert limit(finding(test="tost", unit="ratio", margin=1.1)) == "within " + printed("±10.0 %")


def test_on_the_scale_of_harm_one_is_the_margin() -> None:
    """Whichever way of the metric is better, and for ratios by their logarithm."""
    ends = harm(finding(low=-0.04, estimate=-0.02, high=0.0))
    assert ends == pytest.approx((0.0, 1.0, 2.0))
    ratio = finding(unit="ratio", margin=1.21, low=1 / 1.1, estimate=1.0, high=1.1)
    assert harm(ratio) == pytest.approx((-0.5, 0.0, 0.5))
    assert harm(finding(margin=None)) is None
    assert harm(finding(estimate=None)) is None


def test_worst_answers_come_first_and_repeats_count_as_one() -> None:
    rows = [
        Observation(item, "suite:qa", arm, item, repeat=repeat, text=arm, scores={"correct": score})
        for item, scores in {"half": (1.0, 0.0), "all": (0.0, 0.0), "none": (1.0, 1.0)}.items()
        for repeat, after in enumerate(scores)
        for arm, score in (("baseline", 1.0), ("candidate", after))
    ]
    by = judged(verdict())[0][1]
    lost = worst(paired(rows), by, 9)
    assert [(one.pair.id, one.after) for one in lost] == [("all", 0.0), ("half", 0.5)]


def test_a_control_that_holds_tells_its_numbers() -> None:
    """One that does not says why, in its own words."""
    same = {"estimate": 1.0031, "unit": "ratio"}
    less = {"estimate": -0.002, "unit": "difference"}
    metrics = {"suite:qa correct": less, "replay:week ttft.p95": same}
    assert found(Control("aa", ok=True, detail={"metrics": metrics})) == (
        f"qa correct {printed('-0.2 pp')}, week ttft.p95 {printed('+0.3 %')}"
    )
    unknown = {"suite:qa correct": {"estimate": None, "unit": "difference"}}
    assert found(Control("aa", ok=True, detail={"metrics": unknown})) == "qa correct unknown"
    noticed = Control("sabotage", ok=True, detail={"decisions": {"a": "fail", "b": "inconclusive"}})
    assert found(noticed) == "failed by 1 of 2 guardrails"
    counters = {"calls": {"found": 81234.0, "min": 1}, "hits": {"found": None, "min": 1}}
    ran = Control("activation", ok=True, detail={"counters": counters, "exposed": 212})
    assert found(ran) == "calls 81,234, 212 requests were touched"
    sources = {"a": {"pairs": 100, "baseline": 0.0, "candidate": 0.04},
               "b": {"pairs": 300, "baseline": 0.0, "candidate": 0.0}}  # fmt: skip
    broken = Control("errors", ok=True, detail={"sources": sources})
    assert found(broken).replace("\u00a0", " ") == "baseline 0.0 %, candidate 1.0 %"
    assert found(replace(broken, said="too many")) == "too many"
    for name in get_args(get_type_hints(Control)["name"]):
        assert isinstance(found(Control(name, ok=True)), str)


def test_lost_flips_alone_still_show_the_answers() -> None:
    """A hypothesis may guard only `lost`: what flipped is then `correct`."""
    only = verdict("fail", finding(metric="lost", test="rate_max", unit="share"))
    assert [(source, by.name) for source, by in judged(only)] == [("suite:qa", "correct")]


@given(st.text(alphabet="ab ,\n", max_size=40), st.text(alphabet="ab ,\n", max_size=40))
def test_both_sides_of_a_difference_are_the_texts(before: str, after: str) -> None:
    left, right = difference(before, after)
    assert "".join(text for _, text in left) == before
    assert "".join(text for _, text in right) == after
    same = ["".join(text for kind, text in side if kind == "same") for side in (left, right)]
    assert same[0] == same[1]


def test_a_long_answer_costs_no_more_than_its_first_words() -> None:
    """A hundred thousand words are compared as a whole behind the first few hundred."""
    left, _ = difference("a b " * 50_000, "a c " * 50_000)
    assert len(left) < 2_000
    assert "".join(text for _, text in left) == "a b " * 50_000


def pair_of(before: tuple[int, ...], after: tuple[int, ...]) -> Pair:
    return Pair(
        Observation("a", "suite:qa", "baseline", "a", token_ids=before),
        Observation("a", "suite:qa", "candidate", "a", token_ids=after),
    )


def test_answers_are_the_same_up_to_the_first_difference_or_an_end() -> None:
    """By tokens where both arms tell them, else by words."""
    assert first_difference(pair_of((1, 2, 3), (1, 9, 3))) == (1, True)
    assert first_difference(pair_of((1, 2), (1, 2, 3))) == (2, True)
    assert first_difference(pair_of((1, 2), (1, 2))) == (2, False)
    words = Pair(
        Observation("a", "suite:qa", "baseline", "a", text="one two  three"),
        Observation("a", "suite:qa", "candidate", "a", text="one two four"),
    )
    assert first_difference(words) == (2, True)


def test_pairs_that_failed_are_not_watched() -> None:
    """Whether they would have differed, nobody knows; and the curve goes on to the longest."""
    pairs = [pair_of((1, 2), (9, 2)), pair_of((1, 2, 3), (1, 2, 3))]
    pairs.append(replace(pairs[0], candidate=replace(pairs[0].candidate, outcome="timeout")))
    found = survival("candidate", pairs)
    assert (found.diverged, found.answers, found.longest) == (1, 2, 3)
    assert found.curve.share == (1.0, 0.5)


def test_ratios_by_block_compare_the_same_requests() -> None:
    ratios = block_ratios(paired(run()), "ttft_s", 0.95)
    assert list(ratios) == [0, 1, 2, 3, 4, 5]
    assert list(ratios.values()) == pytest.approx([1.1] * 6)


def test_evidence_counts_a_cluster_once_and_a_fall_as_harm() -> None:
    """Of a metric of which less is better, a rise is what counts as a fall."""
    rows = run(24)
    assert sum(differences(finding(), paired(rows))) == pytest.approx(-1.0)
    assert len(differences(finding(), paired(rows))) == 12
    garbled = [replace(row, scores={"bad_output": 1 - row.scores["correct"]}) for row in rows]
    assert sum(differences(finding(metric="bad_output"), paired(garbled))) == pytest.approx(-1.0)


@pytest.mark.parametrize("flips", [0.02, 0.06, 0.12])
def test_the_chance_to_pass_is_the_plans_power(flips: float) -> None:
    """With the pairs that a plan asks for, the curve stands at the plan's power."""
    pairs = pairs_needed(flips, 0.02, 0.05, 0.8)
    assert chance(pairs, flips, 0.02, 0.05) == pytest.approx(0.8, abs=0.04)
    assert chance(20, flips, 0.02, 0.05) < 0.05


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans(), st.integers(2, 8))
@settings(max_examples=200)
def test_ticks_lie_on_their_axis(low: float, width: float, log: bool, count: int) -> None:
    axis = (
        Axis(abs(low) + 1e-3, abs(low) + 1e-3 + width, log=True) if log else Axis(low, low + width)
    )
    ticks = axis.ticks(count)
    assert ticks == sorted(ticks) and len(ticks) <= 3 * count + 3
    slack = 1e-6 * max(abs(axis.low), abs(axis.high))
    assert all(axis.low - slack <= one <= axis.high + slack for one in ticks) or log
    assert all(0 <= axis.at(one) <= 1 for one in ticks)


def test_a_time_of_nothing_does_not_bend_its_picture() -> None:
    """An answer of one token has no time between tokens; some servers say 0 for it."""
    tpot = finding(metric="tpot.p50", test="ratio_ni", unit="ratio", lost=None, gained=None,
                   estimate=1.0, low=0.9, high=1.1, margin=1.1)  # fmt: skip
    rows = [replace(row, tpot_s=0.0) if row.id == "q-3" else row for row in run()]
    ticks = re.findall(r'class="tick x">([^<]*)<', page(verdict("pass", tpot), rows))
    assert "10" in ticks


def test_counts_have_no_label_between_two_of_them() -> None:
    assert Axis(-0.5, 1.5, whole=True).ticks() == [0, 1]
    assert Axis(-0.5, 99.5, whole=True).ticks() == [0, 20, 40, 60, 80]


def test_reports_are_written_beside_the_verdict(tmp_path: Path) -> None:
    """Whole or not at all, and again over old ones."""
    for _ in range(2):
        written = write_reports(tmp_path, verdict(), run())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert [path.name for path in written] == list(NAMES)
    assert written[0].read_text(encoding="utf-8").startswith("<!doctype html>")
