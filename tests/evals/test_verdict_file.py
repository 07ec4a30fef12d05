"""Verdicts as files: the same bytes for the same run, recomputed from the rows beside them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import zstandard

from evals.controls import Facts
from evals.verdict import Verdict
from evals.verdict_file import (
    PAIRS_FILE,
    VERDICT_FILE,
    BrokenRun,
    Rows,
    differences,
    read_rows,
    read_verdict,
    schema,
    verdict_bytes,
    write_run,
)
from tests.evals.simulated import BASE, OTHER, SPEC, TTFT, failing, hypothesis, observed

PUBLISHED = Path(__file__).parents[2] / "docs" / "verdict.schema.json"


def rows(wrong: float = 0.0) -> Rows:
    return Rows(
        hypothesis=hypothesis(
            guardrails=[{**TTFT, "strata": ["tier"]}],
            activation=[{"metric": "calls", "min": 2.5}],
            design={"sabotage_wrong": "12%", "block": "30s"},
        ),
        observations=tuple(failing(observed(wrong), "candidate", every=40)),
        sides=(BASE, OTHER),
        spec=SPEC,
        now=1000.5,
        facts=Facts(
            activation={"calls": 3.0},
            fingerprints={"candidate": ("fp_c",)},
            design={"blocks": 36},
            versions={"headgate": "0.1.0"},
        ),
    )


def test_a_run_is_recomputed_to_the_byte(tmp_path: Path) -> None:
    told = write_run(tmp_path, rows())
    assert read_verdict(tmp_path) == told
    again = read_rows(tmp_path)
    assert sorted(again.observations, key=repr) == sorted(rows().observations, key=repr)
    assert replace(again, observations=()) == replace(rows(), observations=())
    assert verdict_bytes(again.judged()) == (tmp_path / VERDICT_FILE).read_bytes()
    assert differences(told, again.judged()) == []


def test_the_same_rows_in_any_order_are_the_same_bytes(tmp_path: Path) -> None:
    whole = rows()
    mixed = list(whole.observations)
    random.Random(3).shuffle(mixed)
    write_run(tmp_path / "a", whole)
    write_run(tmp_path / "b", replace(whole, observations=tuple(mixed)))
    for name in (PAIRS_FILE, VERDICT_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_verdict_that_its_rows_do_not_carry_is_found(tmp_path: Path) -> None:
    """One number changed in the verdict, or one answer in the rows."""
    told = write_run(tmp_path, rows())
    findings = list(told.findings)
    findings[0] = replace(findings[0], p=0.5)
    wrong = differences(replace(told, findings=tuple(findings)), read_rows(tmp_path).judged())
    assert len(wrong) == 1 and wrong[0].startswith("findings.0.p: the verdict says 0.5")

    packed = zstandard.ZstdDecompressor().decompress((tmp_path / PAIRS_FILE).read_bytes())
    changed = packed.replace(b'"tier":"batch"', b'"tier":"other"', 1)
    (tmp_path / PAIRS_FILE).write_bytes(zstandard.ZstdCompressor().compress(changed))
    wrong = differences(told, read_rows(tmp_path).judged())
    assert any(one.startswith("pairs_sha256") for one in wrong)


def test_the_published_schema_is_that_of_verdicts(tmp_path: Path) -> None:
    """Made again by the line in docs/verdicts.md; a verdict of every kind of test is valid."""
    published = json.loads(PUBLISHED.read_text())
    assert published == schema()
    write_run(tmp_path, rows())
    payload = json.loads((tmp_path / VERDICT_FILE).read_text())
    jsonschema.validate(payload, published)
    payload["findings"][0]["decision"] = "perhaps"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(payload, published)


def test_what_is_no_run_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(BrokenRun, match="cannot be read: No such file"):
        read_verdict(tmp_path)
    (tmp_path / VERDICT_FILE).write_text('{"hypothesis": 1}')
    with pytest.raises(BrokenRun, match="is no verdict"):
        read_verdict(tmp_path)
    for content in (b"", b"junk", zstandard.ZstdCompressor().compress(b"")):
        (tmp_path / PAIRS_FILE).write_bytes(content)
        with pytest.raises(BrokenRun, match="holds no rows of a run"):
            read_rows(tmp_path)
    packed = zstandard.ZstdCompressor().compress(b'{"rows": 9}')
    (tmp_path / PAIRS_FILE).write_bytes(packed)
    with pytest.raises(BrokenRun, match="rows of schema 9"):
        read_rows(tmp_path)


def test_numbers_that_are_not_finite_never_reach_a_verdict(tmp_path: Path) -> None:
    """JSON has none, and readers in other languages refuse them."""
    write_run(tmp_path, rows(wrong=1.0))

    def refuse(word: str) -> Verdict:
        raise AssertionError(word)

    json.loads((tmp_path / VERDICT_FILE).read_text(), parse_constant=refuse)
