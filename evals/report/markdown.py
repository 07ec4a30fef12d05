"""A verdict as Markdown for a pull request: the decision, every finding, the worst lost answers.

Answers are hostile input: they stand in fenced code only, where they neither link nor mention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evals.questions import named
from evals.report.answers import Lost, judged, paired, scored, worst
from evals.report.checks import NAMES, found
from evals.report.markup import visible
from evals.report.scale import harm
from evals.report.words import (
    SENTENCES,
    SIGNS,
    failed,
    figure,
    flips,
    interval,
    level,
    limit,
    moment,
    pairs_of,
    title,
    what,
    why,
)  # fmt: skip
from evals.verdict import Finding, Verdict
from telemetry import Observation

# GitHub takes 65,536 characters in a comment.
_ANSWER_CHARACTERS, _ANSWERS, _ROWS = 400, 3, 60
# What starts something in Markdown or HTML; underscores only where they could emphasize.
_ACTIVE = re.compile(r"[\\`*\[\]<>#|~@&$]|(?<!\w)_|_(?!\w)|^[-+]")
_BAR = 25


def markdown(verdict: Verdict, rows: Sequence[Observation] = ()) -> str:
    """The comment. `rows` are the run's observations; without them no answer is shown."""
    parts = [
        f"## {SIGNS[verdict.decision]} {title(verdict)}: {plain(verdict.hypothesis)}",
        SENTENCES[verdict.decision],
        "\n".join(f"- {plain(reason)}" for reason in verdict.reasons),
        _table(verdict, "claim", "What was claimed"),
        _table(verdict, "guardrail", "What must not be lost"),
        _controls(verdict),
        _answers(verdict, rows),
        _footer(verdict),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line. Mentions notify nobody."""
    one_line = " ".join(visible(text).split())
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", one_line)


def fenced(text: str) -> str:
    """Text in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _table(verdict: Verdict, kind: str, heading: str) -> str:
    findings = [one for one in verdict.findings if one.kind == kind]
    if not findings:
        return ""
    scale = "goal" if kind == "claim" else "limit"
    lines = [
        f"### {heading}",
        "",
        f"| | | pairs | estimate | {level(findings[0])} interval | must be | 0 to {scale} |",
        "|:-:|---|--:|--:|:-:|--:|---|",
        *(_row(one) for one in findings[:_ROWS]),
    ]
    if len(findings) > _ROWS:
        lines.append(f"\n{len(findings) - _ROWS} more stand in the verdict.")
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    notes = [plain(one) for one in (flips(finding), why(finding), failed(finding)) if one]
    name = "<br>".join([plain(what(finding)), *(f"<sub>{note}</sub>" for note in notes)])
    cells = [
        SIGNS[finding.decision], name, f"{finding.pairs:,}",
        figure(finding, finding.estimate), interval(finding), limit(finding), _bar(finding),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _bar(finding: Finding) -> str:
    """The interval as a line of characters: `┊` is no difference, `┃` what it may reach."""
    ends = harm(finding)
    if ends is None:
        return ""
    low, middle, high = ends

    def cell(value: float) -> int:
        return round((min(max(value, -1.5), 2.5) + 1.5) / 4 * (_BAR - 1))

    line = [" "] * _BAR
    line[cell(low) : cell(high) + 1] = "─" * (cell(high) + 1 - cell(low))
    line[cell(0)], line[cell(1)] = "┊", "┃"
    if finding.test == "tost":
        line[cell(-1)] = "┃"
    line[cell(middle)] = "●"
    return f"`{''.join(line)}`"


def _controls(verdict: Verdict) -> str:
    if not verdict.controls:
        return ""
    told = [
        f"- {'✓' if one.ok else '✗'} {NAMES.get(one.name, one.name)}"
        + (f": {plain(found(one))}" if found(one) else "")
        for one in verdict.controls
    ]
    return "\n".join(["### The gate checked itself", "", *told])


def _answers(verdict: Verdict, rows: Sequence[Observation]) -> str:
    parts = []
    for source, by in judged(verdict):
        pairs = paired(rows, source)
        if scored(pairs, by):
            parts += [_answer(lost) for lost in worst(pairs, by, _ANSWERS)]
    if not parts:
        return ""
    return "\n\n".join(["### Lost answers, the worst first", *parts])


def _answer(lost: Lost) -> str:
    before, after = lost.pair.baseline, lost.pair.candidate
    name = plain(f"{named(before.source)} {before.id}")
    return "\n\n".join([
        f"<details><summary>{name}: {lost.before:.2g} → {lost.after:.2g}</summary>",
        "Baseline",
        fenced(_cut(before.text or before.problem)),
        "Candidate",
        fenced(_cut(after.text or after.problem or after.outcome)),
        "</details>",
    ])  # fmt: skip


def _cut(text: str) -> str:
    if len(text) <= _ANSWER_CHARACTERS:
        return text
    left = len(text) - _ANSWER_CHARACTERS
    return f"{text[:_ANSWER_CHARACTERS]}\n[{left:,} characters more]"


def _footer(verdict: Verdict) -> str:
    return (
        f"<sub>{pairs_of(verdict):,} pairs, {moment(verdict.made_at)}; expires "
        f"{moment(verdict.expires_at)}. Baseline `{verdict.baseline.root[:12]}`, candidate "
        f"`{verdict.candidate.root[:12]}`, specification `{verdict.spec.root[:12]}`.</sub>"
    )
