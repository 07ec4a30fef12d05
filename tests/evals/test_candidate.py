"""What of a candidate goes to a gateway, and what is started; no verdict, no rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import headgate
from evals.candidate import gateway_patch, known, needs_workers
from evals.commands.rollout import standing
from policies.binding import pair, sides
from policies.ledger import Ledger
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


def verdict(file: Path, decision: str = "pass", **more: object) -> dict[str, object]:
    """As much of a verdict as a ledger keeps."""
    named = {name: {"root": root, "leaves": {}} for name, root in roots(file).items()}
    base = {"hypothesis": "routing", "decision": decision, "made_at": 1.0, "expires_at": None}
    return {**base, **named, **more}


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
    why = standing(book, roots(file))
    assert "no verdict for exactly this" in str(why(2.0))
    book.record_verdict(verdict(file, expires_at=5.0))
    assert why(2.0) is None
    assert "expired" in str(why(6.0))
    book.record_verdict(verdict(file, "fail", made_at=2.0))
    assert why(3.0) == "its last verdict is fail"
    book.record_verdict(verdict(file, made_at=3.0))
    assert why(4.0) is None
    book.quarantine("routing", roots(file)["candidate"], "it looped", at=4.0)
    assert "quarantined until a newer verdict passes: it looped" in str(why(5.0))
    book.record_verdict(verdict(file, made_at=6.0))
    assert why(7.0) is None


@pytest.mark.parametrize(("decision", "code", "said"), [
    (None, 3, "may not go live"), ("fail", 3, "its last verdict is fail"),
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
