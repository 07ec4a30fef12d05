"""What of a candidate goes to a gateway, and what is started; no verdict, no rollout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import headgate
from evals.candidate import gateway_patch, known, needs_workers
from evals.commands.rollout import Case, case_of, standing
from policies.binding import pair, sides
from policies.ledger import ON_DRIFT, Decision, Ledger
from policies.load import load_hypothesis
from tests.gateway.world import on_loop, refused_port, upstream

POLICY = "version: 1\nupstreams: [{url: 'http://127.0.0.1:9'}]\n"
HYPOTHESIS = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: routing}
baseline: {config: base.yaml}
candidate: {patch: {gateway.routing.policy: round_robin, gateway.hedge: {ttft_s: 0.5}}}
kind_of_change: routing_only
guardrails: [{replay: week, metric: slo_attained, test: paired_ni, margin: 2%}]
"""


def world(folder: Path, policy: str = POLICY, hypothesis: str = HYPOTHESIS) -> Path:
    (folder / "base.yaml").write_text(policy)
    (folder / "week.jsonl").write_text('{"t_s": 0, "body": {"prompt": "x"}}\n')
    file = folder / "h.yaml"
    file.write_text(hypothesis)
    return file


def roots(file: Path) -> dict[str, str]:
    found = sides(file, load_hypothesis(file))
    return dict(zip(("baseline", "candidate", "spec"), (one.root for one in found), strict=True))


def verdict(file: Path, decision: str = "pass", **more: object) -> dict[str, Any]:
    """As much of a verdict as a ledger keeps."""
    found = sides(file, load_hypothesis(file))
    named = {
        name: {"root": side.root, "leaves": dict(side.leaves)}
        for name, side in zip(("baseline", "candidate", "spec"), found, strict=True)
    }
    base = {
        "hypothesis": "routing", "decision": decision, "made_at": 1.0, "expires_at": None,
        "findings": [
            {"name": "g", "kind": "guardrail", "source": "replay:week", "metric": "served"}
        ],
    }  # fmt: skip
    return {**base, **named, **more}


def case(file: Path, book: Ledger) -> Case:
    found = case_of(file, book.folder)
    assert isinstance(found, Case)
    return found


def test_what_the_gateway_changes_goes_to_the_gateway(tmp_path: Path) -> None:
    """Whole values at the paths that differ; no worker is started for them."""
    file = world(tmp_path)
    both = pair(file, load_hypothesis(file))
    assert not needs_workers(*both)
    patch = gateway_patch(*both)
    assert patch["gateway.routing.policy"] == "round_robin"
    assert patch["gateway.hedge"]["ttft_s"] == 0.5


def test_what_the_runtime_changes_needs_workers(tmp_path: Path) -> None:
    hypothesis = HYPOTHESIS.replace("gateway.routing.policy: round_robin", "runtime.workers: 2")
    file = world(tmp_path, "version: 1\nruntime: {}\n", hypothesis)
    assert needs_workers(*pair(file, load_hypothesis(file)))


def test_why_a_candidate_may_not_go_live(tmp_path: Path) -> None:
    """No verdict, a fail, an expired pass, a quarantine: each says what to do."""
    file = world(tmp_path)
    book = Ledger.open(tmp_path / "ledger")
    stands = standing(case(file, book))

    def why(now: float) -> str:
        found = stands(now)
        assert found.enabled == (found.state == "on")
        return "" if found.enabled else found.why

    assert f"there is no verdict: headgate gate run {file}" in why(2.0)
    book.record_verdict(verdict(file, expires_at=5.0))
    assert why(2.0) == ""
    assert "its verdict is 0 days old" in why(6.0)
    book.record_verdict(verdict(file, "fail", made_at=2.0))
    assert why(3.0) == "its verdict is fail"
    book.record_verdict(verdict(file, made_at=3.0))
    assert why(4.0) == ""
    book.quarantine("routing", roots(file)["candidate"], "it looped", at=4.0)
    assert why(5.0) == "it looped: it needs a verdict that is newer"
    book.record_verdict(verdict(file, made_at=6.0))
    assert why(7.0) == ""


def test_a_pass_holds_for_a_rollout_as_far_as_what_has_changed_spoils_nothing_of_it(
    tmp_path: Path,
) -> None:
    """Targets are others than when it was judged, and nothing was found about targets; then a
    template is another. The gateway is told the roots of the verdict, which its ledger has."""
    file = world(tmp_path)
    book = Ledger.open(tmp_path / "ledger")
    kept = verdict(file)
    book.record_verdict(kept)
    assert standing(case(file, book))(2.0).enabled
    slower = "gateway: {tiers: {interactive: {ttft_ms: 9000}}}\n"
    file = world(tmp_path, POLICY + slower)
    changed = case(file, book)
    assert changed.roots["baseline"] != kept["baseline"]["root"]
    assert standing(changed)(2.0).enabled
    cache = "gateway: {response_cache: {tiers: [batch]}}\n"
    file = world(tmp_path, POLICY + cache)
    found = standing(case(file, book))(2.0)
    assert (found.enabled, found.state, found.leaves) == (False, "stale", ("response_cache",))


def test_traffic_that_has_moved_ends_a_pass_unless_it_shall_only_be_told(tmp_path: Path) -> None:
    file = world(tmp_path)
    book = Ledger.open(tmp_path / "ledger")
    book.record_verdict(verdict(file))
    named = roots(file).values()
    stands = standing(case(file, book))
    moved = Decision("drift", "routing", "", "", "", 2.0, "moved", "lengths have moved")
    for drift, live in (
        (moved, False),
        (replace(moved, at=3.0, decision="same", reason=""), True),
        (replace(moved, at=4.0), False),
    ):
        book.record(drift)
        assert (book.read().live(*named, 5.0) is not None, stands(5.0).enabled) == (live, live)
    book.record(replace(moved, at=5.0, detail={ON_DRIFT: "warn"}))
    assert book.read().live(*named, 6.0) is not None


@pytest.mark.parametrize(("decision", "code", "said"), [
    (None, 3, "may not go live"), ("fail", 3, "its verdict is fail"),
])  # fmt: skip
def test_the_command_starts_nothing_without_a_pass(
    tmp_path: Path, decision: str | None, code: int, said: str
) -> None:
    file = world(tmp_path)
    ledger = tmp_path / "ledger"
    if decision is not None:
        Ledger.open(ledger).record_verdict(verdict(file, decision))
    options = ["rollout", str(file), "--url", refused_port(), "--ledger", str(ledger)]
    done = CliRunner().invoke(headgate.main, options)
    assert (done.exit_code, said in done.output) == (code, True)


def test_a_wrong_hypothesis_is_told_with_its_place(tmp_path: Path) -> None:
    file = world(tmp_path, hypothesis=HYPOTHESIS.replace("routing_only", "routing_olny"))
    done = CliRunner().invoke(headgate.main, ["rollout", str(file)])
    assert done.exit_code == 2
    assert "h.yaml:6:17  kind_of_change" in done.output


@on_loop
async def test_servers_are_pinned_to_what_they_are_now() -> None:
    """One that tells nothing of itself is not pinned."""
    body = b'{"system_fingerprint": "fp_1"}'
    async with upstream(fingerprint=body) as ours, upstream() as foreign:
        assert (await known([{"url": ours.url}])).fingerprints == ("fp_1",)
        assert (await known([{"url": ours.url}, {"url": foreign.url}])).fingerprints == ()
        assert (await known([{"url": refused_port()}])).fingerprints == ()
