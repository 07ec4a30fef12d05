"""Counters that prove that a change ran: one that no service has is refused at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.activation import refuse_missing, refuse_uncounted
from evals.questions import Unanswerable
from policies.load import load_hypothesis
from policies.patching import variants
from policies.problems import PolicyError

FILE = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: proven}
baseline: {config: base.yaml}
candidate: {CANDIDATE}
kind_of_change: lossy_model
guardrails: [{suite: pocket, metric: served, test: paired_ni, margin: 2%}]
activation:
- {metric: steps}
- {metric: METRIC, min: 5}
"""
OURS = "patch: {runtime.kv: int8}"
WORKER = "version: 1\nruntime: {model: pocket}\n"
EDGE = "version: 1\nupstreams: [{url: 'http://127.0.0.1:9'}]\n"


def refused(path: Path, metric: str, policy: str = WORKER, candidate: str = OURS) -> str:
    (path / "base.yaml").write_text(policy)
    file = path / "proven.yaml"
    file.write_text(FILE.replace("METRIC", metric).replace("CANDIDATE", candidate))
    asked = load_hypothesis(file)
    try:
        refuse_uncounted(file, asked, variants(file, asked)[1])
    except PolicyError as error:
        return str(error).replace(str(file), "proven.yaml")
    return ""


def test_a_counter_that_no_service_has_is_refused_at_its_place(tmp_path: Path) -> None:
    assert refused(tmp_path, "quantised_weight_steps") == (
        "proven.yaml:10:12  activation[1].metric  no service counts 'quantised_weight_steps': "
        "docs/metrics.md has what they count; did you mean 'quantized_weight_steps'?"
    )
    assert "did you mean 'trimmed_tokens'?" in refused(tmp_path, "trimed_tokens")
    assert "did you mean" not in refused(tmp_path, "zzz")
    assert refused(tmp_path, "running_requests"), "a gauge proves nothing"


@pytest.mark.parametrize(
    "metric",
    [
        "quantized_kv_steps", "headgate_steps_total", "response_cache_hits", "accepted_tokens",
        "cached_answers", "http_requests", "vllm:spec_decode_num_drafts",
        "headgate_step_seconds_count", "process_cpu_seconds",
    ],
)  # fmt: skip
def test_counters_of_our_services_and_fields_of_observations_are_none_of_these(
    tmp_path: Path, metric: str
) -> None:
    """With what stands before and behind their names, or without it."""
    assert refused(tmp_path, metric) == ""


def test_what_workers_count_nobody_counts_where_a_policy_starts_none(tmp_path: Path) -> None:
    patch = "patch: {gateway.routing.policy: round_robin}"
    said = refused(tmp_path, "quantized_kv_steps", EDGE, patch)
    assert "quantized_kv_steps is counted by workers, and the policy starts none" in said
    assert refused(tmp_path, "replica_requests", EDGE, patch).count("activation[1]") == 0


def test_a_server_at_a_url_is_asked_itself(tmp_path: Path) -> None:
    """What other servers count is known once they are there."""
    assert refused(tmp_path, "sglang:spec_accept", candidate="url: 'http://127.0.0.1:9'") == ""
    asked = load_hypothesis(tmp_path / "proven.yaml")
    told = ["headgate_steps_total", "sglang:spec_accept_length"]
    with pytest.raises(Unanswerable, match=r"did you mean 'sglang:spec_accept_length'\?") as raised:
        refuse_missing(asked, told, ["http://127.0.0.1:9/metrics"])
    assert raised.value.where == ("activation", 1, "metric")
    refuse_missing(asked, [*told, "sglang:spec_accept_total"], [])
