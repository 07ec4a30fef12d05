"""A suite: rows to ask, and how their answers are scored. docs/suites.md describes every field.

The shape of the YAML file only; `evals/dataset.py` reads the rows.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from policies.fields import VARIABLE, PolicyModel, base_url, refuse
from policies.quantities import Duration

ScorerKind = Literal[
    "exact", "contains", "regex", "numeric", "choice", "f1", "json", "fields", "tool_calls",
    "instructions", "code", "judge", "perplexity", "kl", "bad_output", "refusal",
]  # fmt: skip
Ignored = Literal["case", "space", "punctuation", "articles"]
NAME = r"^[a-z][a-z0-9_]{0,63}$"
SUITE_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# Option -> the scorers that take it. What is not here, all take.
_TAKEN_BY: dict[str, tuple[ScorerKind, ...]] = {
    "ignore": ("exact", "contains", "f1", "fields", "regex"),
    "all": ("contains", "instructions"),
    "pattern": ("regex",),
    "absolute": ("numeric", "fields"),
    "relative": ("numeric", "fields"),
    "which": ("numeric", "regex"),
    "choices": ("choice",),
    "json_schema": ("json",),
    "keys": ("fields",),
    "timeout": ("code", "judge"),
    "memory_mb": ("code",),
    "url": ("judge",),
    "model": ("judge",),
    "api_key_env": ("judge",),
    "rubric": ("judge",),
    "against": ("judge",),
    "votes": ("judge",),
}


class Scorer(PolicyModel):
    """One way to score an answer. Scores lie in [0, 1], but for `perplexity` and `kl`."""

    kind: ScorerKind = Field(description="How an answer is scored: docs/suites.md.")
    name: str | None = Field(
        None, pattern=NAME, description="Name of its metric. Default: the kind."
    )
    field: str = Field("expected", min_length=1, description="Field of the rows to compare with.")
    where: dict[str, str] = Field(
        {}, description="Only rows whose fields have these values, such as `task: tool`."
    )
    after: str | None = Field(
        None,
        min_length=1,
        description="Score only what follows the last time that this text occurs: `</think>`.",
    )
    ignore: tuple[Ignored, ...] = Field(
        ("space",), strict=False, description="What does not count when texts are compared."
    )
    all: bool = Field(True, description="All of what is expected, or else the share that is there.")
    pattern: str | None = Field(
        None, min_length=1, description="Pattern; its first group is compared with the row's field."
    )
    absolute: float = Field(0.0, ge=0, description="Largest difference of a number that is right.")
    relative: float = Field(1e-6, ge=0, description="The same, as a share of the expected number.")
    which: Literal["first", "last"] = Field("last", description="Which match in the answer counts.")
    choices: tuple[str, ...] = Field(
        ("A", "B", "C", "D"),
        strict=False,
        min_length=2,
        max_length=64,
        description="What can be chosen.",
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="JSON Schema that an answer keeps. Default: the row's own, if any."
    )
    keys: tuple[str, ...] = Field(
        (), strict=False, description="Fields that count, as `a.b`. Default: all that are expected."
    )
    timeout: Duration = Field(
        10.0, gt=0, le=600, description="Longest time that code may run or a judge may take."
    )
    memory_mb: int = Field(512, ge=64, le=16384, description="Memory that code may take.")
    url: str | None = Field(None, description="Base URL of the judge, OpenAI-compatible.")
    model: str | None = Field(None, min_length=1, description="Name of the judge's model.")
    api_key_env: str | None = Field(
        None, pattern=VARIABLE, description="Environment variable with the judge's key."
    )
    rubric: str = Field(
        "Which answer is more correct, more helpful and more to the point?",
        min_length=1,
        max_length=8192,
        description="What the judge is asked of two answers.",
    )
    against: Literal["expected", "baseline"] = Field(
        "expected",
        description="What each answer is compared with: the row's own, or the baseline's answer.",
    )
    votes: int = Field(1, ge=1, le=15, description="How often the judge is asked in each order.")

    @property
    def called(self) -> str:
        return self.name or self.kind

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None:
                re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        return None if url is None else base_url(url)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Scorer:
        misfits: list[tuple[tuple[str | int, ...], str, object]] = []
        for option in sorted(self.model_fields_set & _TAKEN_BY.keys()):
            if self.kind not in _TAKEN_BY[option]:
                takers = " or ".join(_TAKEN_BY[option])
                misfits.append(((option,), f"is an option of {takers}, not of {self.kind}", None))
        if self.kind == "judge":
            missing = [one for one in ("url", "model") if getattr(self, one) is None]
            misfits += [(("kind",), f"a judge needs `{one}`", self.kind) for one in missing]
        if self.kind == "kl" and "field" in self.model_fields_set:
            misfits.append((("field",), "kl compares with the baseline, not with a field", None))
        refuse(misfits)
        return self


class SuiteFile(PolicyModel):
    """A suite file, whole."""

    apiVersion: Literal["headgate/v1"] = Field(  # noqa: N815  # as such files are headed
        description="`headgate/v1`."
    )
    kind: Literal["Suite"] = Field(description="`Suite`.")
    name: str = Field(pattern=SUITE_NAME, description="Name of the suite, as verdicts tell it.")
    note: str = Field("", max_length=4096, description="What it asks, and where it comes from.")
    data: str = Field(
        min_length=1, description="JSONL file with the rows, relative to the suite; may be .gz."
    )
    cluster: str = Field(
        "cluster",
        min_length=1,
        description="Field of the rows with the conversation or document that they belong to.",
    )
    ask: Literal["chat", "completion"] = Field(
        "chat", description="How a row with a `prompt` is asked."
    )
    system: str | None = Field(
        None, min_length=1, description="System prompt of rows that have none."
    )
    max_tokens: int | None = Field(
        None, ge=0, le=10**6, description="Longest answer. Default: the model's."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="Sampling temperature. Default: the server's."
    )
    seed: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Sampling seed. Default: the hypothesis's."
    )
    scorers: tuple[Scorer, ...] = Field(
        strict=False,
        min_length=1,
        max_length=32,
        description="How answers are scored. The first that takes a row says whether it is "
        "`correct`.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> SuiteFile:
        seen: dict[str, int] = {}
        misfits: list[tuple[tuple[str | int, ...], str, object]] = []
        for index, scorer in enumerate(self.scorers):
            where = ("scorers", index)
            if scorer.called == "correct":
                misfits.append(
                    ((*where, "name"), "`correct` is the score of a row's first scorer", None)
                )
            if scorer.called in seen:
                first = seen[scorer.called]
                why = f"two scorers are called {scorer.called!r}, here and at scorers[{first}]"
                misfits.append(((*where, "kind"), f"{why}; give one a `name`", scorer.kind))
            seen.setdefault(scorer.called, index)
        refuse(misfits)
        return self
