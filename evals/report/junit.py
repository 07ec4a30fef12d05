"""A verdict as JUnit XML: a test case for each finding, each control, and the whole.

A failed guardrail is a failure, an invalid run an error, an inconclusive finding is skipped and
says so in a property: the exit code, not this file, is what gates.
"""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree as Xml

from evals.report.checks import found
from evals.report.markup import visible
from evals.report.words import figure, interval, limit, title, what, why
from evals.verdict import Control, Finding, Verdict

_OUTCOMES = {
    "fail": "failure", "no_benefit": "failure", "invalid": "error", "inconclusive": "skipped"
}  # fmt: skip


def junit(verdict: Verdict) -> str:
    """The document, as text with its declaration."""
    cases = [_whole(verdict), *(_finding(verdict, one) for one in verdict.findings)]
    cases += [_control(verdict, one) for one in verdict.controls]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {name: str(count) for name, count in counts.items()}
    at = datetime.fromtimestamp(verdict.made_at, UTC).isoformat(timespec="seconds")
    root = Xml.Element("testsuites", {"name": "headgate gate", **attributes})
    suite = Xml.SubElement(
        root, "testsuite", {"name": visible(verdict.hypothesis), "timestamp": at, **attributes}
    )
    _properties(suite, {
        "decision": verdict.decision, "reason": verdict.reason,
        "baseline": verdict.baseline.root, "candidate": verdict.candidate.root,
        "spec": verdict.spec.root, "pairs_sha256": verdict.pairs_sha256,
    })  # fmt: skip
    suite.extend(cases)
    Xml.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{Xml.tostring(root, encoding="unicode")}\n'


def _whole(verdict: Verdict) -> Xml.Element:
    case = _case(verdict, "verdict", "verdict")
    _properties(case, {"decision": verdict.decision, "exit_code": verdict.exit_code})
    _outcome(case, verdict.decision, title(verdict), "\n".join(verdict.reasons))
    return case


def _finding(verdict: Verdict, finding: Finding) -> Xml.Element:
    case = _case(verdict, f"{finding.kind}.{finding.source}", _name(finding))
    told = ("decision", "reason", "test", "method", "pairs", "clusters", "lost", "gained",
            "baseline", "candidate", "estimate", "low", "high", "margin", "alpha", "p", "mde",
            "pairs_needed", "errors", "complete_estimate")  # fmt: skip
    _properties(case, {name: getattr(finding, name) for name in told})
    said = (
        f"{what(finding)}: {figure(finding, finding.estimate)}, interval {interval(finding)}, "
        f"must be {limit(finding)}"
    )
    # In a run that is invalid nothing was found: no finding of it is a failure.
    decision = "invalid" if verdict.decision == "invalid" else finding.decision
    _outcome(case, decision, said, why(finding))
    return case


def _name(finding: Finding) -> str:
    """With its stratum, which some names have already."""
    stratum = f"[{finding.stratum}]"
    return finding.name if finding.name.endswith(stratum) else f"{finding.name} {stratum}"


def _control(verdict: Verdict, control: Control) -> Xml.Element:
    case = _case(verdict, "control", control.name)
    _properties(case, {"found": found(control), **control.detail})
    _outcome(case, "pass" if control.ok else "invalid", found(control) or control.name, "")
    return case


def _case(verdict: Verdict, group: str, name: str) -> Xml.Element:
    where = f"{verdict.hypothesis}.{group}"
    return Xml.Element("testcase", {"classname": visible(where), "name": visible(name)})


def _outcome(case: Xml.Element, decision: str, message: str, body: str) -> None:
    kind = _OUTCOMES.get(decision)
    if kind:
        outcome = Xml.SubElement(case, kind, {"message": visible(message), "type": decision})
        outcome.text = visible(body) or None


def _properties(parent: Xml.Element, values: dict[str, object]) -> None:
    told = {name: value for name, value in values.items() if value not in (None, "")}
    if told:
        properties = Xml.SubElement(parent, "properties")
        for name, value in told.items():
            attributes = {"name": visible(str(name)), "value": visible(str(value))}
            Xml.SubElement(properties, "property", attributes)
