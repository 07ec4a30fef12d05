"""What exactly was compared: leaves of both sides, the ones that differ first."""

from __future__ import annotations

from evals.report.markup import Markup, tag
from evals.verdict import Side, Verdict


def fingerprints(verdict: Verdict) -> Markup:
    """A table of what differs, and the rest behind a click."""
    before, after = verdict.baseline.leaves, verdict.candidate.leaves
    names = sorted({*before, *after})
    changed = [name for name in names if before.get(name) != after.get(name)]
    same = [name for name in names if name not in changed]
    return tag(
        "section",
        tag("h2", "What was compared"),
        tag("p", _lead(len(changed), len(same)), class_="lead"),
        _table(changed, verdict.baseline, verdict.candidate) if changed else None,
        tag(
            "details",
            tag("summary", f"{len(same)} parts that are the same"),
            _digests(same, verdict.baseline),
        )
        if same
        else None,
        tag(
            "details",
            tag("summary", "What it was measured by: the specification"),
            _digests(sorted(verdict.spec.leaves), verdict.spec),
        ),
    )


def _lead(changed: int, same: int) -> str:
    if not changed:
        return "Both sides are the same in every part."
    parts = "part differs" if changed == 1 else "parts differ"
    return f"{changed} {parts}, {same} are the same. The verdict holds for exactly these two."


def _table(names: list[str], before: Side, after: Side) -> Markup:
    head = tag("tr", *(tag("th", name, scope="col") for name in ("part", "baseline", "candidate")))
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", _short(side.leaves.get(name))) for side in (before, after)),
        )
        for name in names
    ]
    roots = tag(
        "tr",
        tag("th", "all of it", scope="row"),
        *(tag("td", _short(side.root)) for side in (before, after)),
        class_="root",
    )
    table = tag("table", tag("thead", head), tag("tbody", *rows, roots))
    return tag("div", table, class_="scroll", tabindex="0", role="region",
               aria_label="Parts that differ")  # fmt: skip


def _short(digest: str | None) -> Markup:
    if digest is None:
        return tag("span", "absent", class_="quiet")
    return tag("code", digest[:16], title=digest if len(digest) > 16 else None)


def _digests(names: list[str], side: Side) -> Markup:
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", _short(side.leaves[name])))
        for name in names
    ]
    rows.append(tag("tr", tag("th", "all of it", scope="row"), tag("td", _short(side.root)),
                    class_="root"))  # fmt: skip
    return tag("table", tag("tbody", *rows))
