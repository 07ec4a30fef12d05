"""One page with everything that a verdict says, in one file that loads nothing from anywhere.

No script: the theme is chosen by radio buttons, answers open by `details`. The page's own policy
forbids everything but its style, so that a hostile answer could not act even where it got through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

from evals.report.answers import judged
from evals.report.checks import NAMES, found
from evals.report.divergence import divergences
from evals.report.evidence import evidence, planned_power
from evals.report.fingerprints import fingerprints
from evals.report.forest import badge, forest
from evals.report.latency import latencies
from evals.report.markup import Markup, join, tag
from evals.report.waffle import answers
from evals.report.words import SENTENCES, SIGNS, TITLES, moment, pairs_of
from evals.verdict import Control, Verdict
from telemetry import Observation

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(verdict: Verdict, rows: Sequence[Observation] = ()) -> str:
    """The document. `rows` are the observations of the run; without them pictures of pairs are
    left out."""
    body = join(
        tag("a", "Skip to the findings", href="#findings", class_="skip"),
        _header(verdict),
        tag("main", *_sections(verdict, rows), id="findings"),
        _footer(verdict),
    )
    return document(f"{TITLES[verdict.decision]}: {verdict.hypothesis}", body)


def document(title: str, body: Markup) -> str:
    """A whole page around a body, with the style that every report has."""
    style = files("evals.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def themes() -> Markup:
    """Light, dark, or as the reader's system has it."""
    choices = (("auto", "Auto"), ("light", "Light"), ("dark", "Dark"))
    return tag(
        "fieldset",
        tag("legend", "Theme"),
        *(
            tag("label", tag("input", type="radio", name="theme", id=f"theme-{key}",
                             checked=key == "auto"), tag("span", name))
            for key, name in choices
        ),
        class_="themes",
    )  # fmt: skip


def _header(verdict: Verdict) -> Markup:
    reason = verdict.reason.replace("_", " ")
    told = {
        "Change": verdict.kind_of_change.replace("_", " "),
        "Pairs": f"{pairs_of(verdict):,}",
        "Alpha": _plain(verdict.stats.get("alpha")),
        "Measured": moment(verdict.made_at),
        "Expires": moment(verdict.expires_at),
    }
    return tag(
        "header",
        tag("div", tag("span", "Headgate · verdict", class_="brand"), themes(), class_="top"),
        tag("h1", verdict.hypothesis),
        tag(
            "div",
            tag("p", tag("i", SIGNS[verdict.decision], aria_hidden="true"),
                tag("b", TITLES[verdict.decision]), tag("span", reason) if reason else None,
                class_="stamp"),
            tag("div", tag("p", SENTENCES[verdict.decision], class_="sentence"),
                tag("ul", *(tag("li", one) for one in verdict.reasons)) if verdict.reasons
                else None),
            class_=f"decision {verdict.decision}",
        ),
        facts(told),
    )  # fmt: skip


def facts(told: Mapping[str, str]) -> Markup:
    """Names and values in a row."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in told.items() if value),
        class_="facts",
    )


def _sections(verdict: Verdict, rows: Sequence[Observation]) -> list[Markup]:
    claims = [one for one in verdict.findings if one.kind == "claim"]
    guardrails = [one for one in verdict.findings if one.kind == "guardrail"]
    return [
        forest(claims, "What was claimed",
               "Each claim is shown only when its whole interval lies beyond what was asked for."),
        forest(guardrails, "What must not be lost",
               "Harm grows to the right, in multiples of what each guardrail allows. One passes "
               "when its whole interval stays clear of the limit; all of them must."),
        _controls(verdict.controls),
        _section("Answers, pair by pair", *(answers(rows, *key) for key in judged(verdict))),
        _section("Time", latencies(verdict.findings, rows)),
        _section("Evidence", evidence(guardrails, rows, planned_power(verdict.stats))),
        _section("Where answers part", divergences(rows)),
        fingerprints(verdict),
    ]  # fmt: skip


def _section(heading: str, *content: Markup) -> Markup:
    """A section, or nothing where it would be empty."""
    if not any(content):
        return Markup()
    return tag("section", tag("h2", heading), *content)


def _controls(controls: Sequence[Control]) -> Markup:
    if not controls:
        return Markup()
    return tag(
        "section",
        tag("h2", "The gate checked itself"),
        tag(
            "ul",
            *(
                tag("li", badge("pass" if one.ok else "fail"),
                    tag("div", tag("strong", NAMES.get(one.name, one.name)),
                        tag("span", found(one), class_="quiet")))
                for one in controls
            ),
            class_="controls",
        ),
    )  # fmt: skip


def _footer(verdict: Verdict) -> Markup:
    told = {
        "Design": _told(verdict.design),
        "Statistics": _told(verdict.stats),
        "Versions": _told(verdict.versions),
        "Pairs, SHA-256": verdict.pairs_sha256,
    }
    return tag(
        "footer",
        facts(told),
        tag(
            "p",
            "Everything here is computed from the pairs. ",
            tag("code", "headgate gate verify"),
            " computes the verdict again from them, on any machine.",
        ),
    )


def _told(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
