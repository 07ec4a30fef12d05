"""Hypothesis files: what is taken, and what is refused with its place and a suggestion."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from policies.hypothesis import Hypothesis
from policies.knobs import KNOBS, allowed, kinds_for, knob_of
from policies.load import PolicyError, load_hypothesis
from policies.patching import differences, patched, variants
from policies.problems import every_field
from policies.schema import Deployment
from policies.yaml_tree import parse

ROOT = Path(__file__).parents[2]
BASE = "version: 1\nruntime: {model: pocket, threads: 1}\n"
WHOLE = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: w8a8-support-chat, owner: infra, ticket: OPT-41}
baseline: {config: base.yaml}
candidate: {config: base.yaml, patch: {runtime.weights: w8a8}}
kind_of_change: lossy_model
claims: [{metric: tpot.p50, direction: lower, min_effect: 8%}]
guardrails:
- {suite: support-qa, metric: correct, test: paired_ni, margin: 0.02, cluster: conversation}
- {suite: support-qa, metric: lost, test: rate_max, max: 0.03}
- {replay: prod-week, metric: ttft.p95, test: ratio_ni, margin: 10%, strata: [tier, prompt_bucket]}
- {replay: prod-week, metric: output_tokens, test: tost, margin: 10%}
design: {order: abba, block: 60s, warmup: 1 block, repeats: 1, temperature: as_recorded}
stats: {alpha: 0.05, power: 0.8, mode: sequential, max_pairs: 3000, seed: 7}
activation: [{metric: quantized_linear_calls, min: 1}]
validity: {max_age: 30d, on_traffic_drift: stale, min_affected_pairs: 149}
rollout: {shadow: 500 pairs, steps: [1%, 5%, 25%, 100%], min_step: 10m, monitor: same guardrails}
"""


def written(folder: Path, text: str = WHOLE) -> Path:
    (folder / "base.yaml").write_text(BASE)
    file = folder / "hypothesis.yaml"
    file.write_text(text)
    return file


def refusal(folder: Path, old: str, new: str) -> str:
    """What is said of the file with one thing changed."""
    assert old in WHOLE
    file = written(folder, WHOLE.replace(old, new, 1))
    with pytest.raises(PolicyError) as caught:
        variants(file, load_hypothesis(file))
    return str(caught.value).replace(f"{folder}/", "")


def test_a_hypothesis_is_read_with_its_quantities(tmp_path: Path) -> None:
    """Percent, times and counted things are numbers afterwards."""
    read = load_hypothesis(written(tmp_path))
    assert read.claims[0].min_effect == 0.08
    assert (read.design.block, read.design.warmup) == (60.0, 1)
    assert read.validity.max_age == 30 * 86400
    assert (read.rollout.shadow, read.rollout.steps) == (500, (0.01, 0.05, 0.25, 1.0))
    assert read.sources == ("suite:support-qa", "replay:prod-week")
    assert read.source_of(read.claims[0]) == "replay:prod-week"


def test_the_two_configurations_differ_in_the_patch_alone(tmp_path: Path) -> None:
    file = written(tmp_path)
    base, other = variants(file, load_hypothesis(file))
    assert base is not None
    assert other is not None
    changed = differences(base.deployment, other.deployment)
    assert {knob_of(path) for path in changed} == {"runtime.weights"}
    assert other.data["runtime"]["threads"] == 1


def test_a_candidate_without_a_policy_file_patches_the_baselines(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE.replace("{config: base.yaml, patch", "{patch"))
    base, other = variants(file, load_hypothesis(file))
    assert base is not None
    assert other is not None
    assert other.file == base.file


def test_servers_that_run_need_no_policy_file(tmp_path: Path) -> None:
    text = WHOLE.replace("{config: base.yaml}", '{url: "http://127.0.0.1:1"}')
    text = text.replace(
        "{config: base.yaml, patch: {runtime.weights: w8a8}}", '{url: "http://127.0.0.1:2"}'
    )
    file = written(tmp_path, text)
    assert variants(file, load_hypothesis(file)) == (None, None)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("runtime.weights", "runtime.wieghts",
         "hypothesis.yaml:5:57  candidate.patch.runtime.wieghts  is no knob that a hypothesis may "
         "change; did you mean 'runtime.weights'?"),
        ("w8a8}", "w8a9}", "hypothesis.yaml:5:57  candidate.patch.runtime.weights"),
        ("w8a8}", "w8a9}", "did you mean 'w8a8'?"),
        ("runtime.weights: w8a8", "gateway.trim: {drop: oldest}",
         "may not touch gateway.trim: say `kind_of_change: lossy_input`"),
        ("runtime.weights: w8a8", "gateway.port: 9000", "is no knob that a hypothesis may change"),
        ("margin: 0.02", "margin: -0.02",
         "hypothesis.yaml:9:65  guardrails[0].margin  expected more than 0, got the number -0.02"),
        ("margin: 0.02", "max: 0.02", "guardrails[0].test  paired_ni needs `margin`"),
        ("paired_ni", "paired_in", "did you mean 'paired_ni'?"),
        ("suite: support-qa, ", "", "hypothesis.yaml:9:3  guardrails[0]  give `suite` or `replay`"),
        ("suite: support-qa", "suite: a, replay: b", "give `suite` or `replay`, not both"),
        ("30d", "30y", "validity.max_age  expected seconds, or a time such as 30s, 10m or 7d"),
        ("500 pairs", "500 blocks", "expected a number of pairs such as 3 pairs"),
        ("8%", "8 percent", "expected a share such as 0.02 or 2%"),
        (", patch: {runtime.weights: w8a8}", "", "candidate  changes nothing"),
        ("candidate: {config: base.yaml", 'candidate: {url: "http://a"',
         "a server that runs cannot be patched"),
        ("[1%, 5%,", "[5%, 1%,", "expected shares above 0 that rise to 100% at most"),
        ("kind_of_change: lossy_model\n", "", "missing: What the change can do to answers"),
        ("baseline: {config: base", "baseline: {config: bass",
         "bass.yaml: no such file; did you mean 'base.yaml'?"),
        ("kind: Hypothesis", "kind: Suite", "hypothesis.yaml:2:7  kind  expected 'Hypothesis'"),
        ("guardrails:", "gaurdrails:", "gaurdrails  unknown field; did you mean 'guardrails'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert said in refusal(tmp_path, old, new)


def test_two_files_may_differ_in_knobs_only(tmp_path: Path) -> None:
    """A port is none: the second file may have its own, the gate starts both on ports of its
    own, but what is judged must be what the hypothesis says."""
    text = WHOLE.replace(
        "{config: base.yaml, patch: {runtime.weights: w8a8}}", "{config: other.yaml}"
    )
    file = written(tmp_path, text)
    (tmp_path / "other.yaml").write_text(BASE.replace("threads: 1", "served_name: a"))
    with pytest.raises(
        PolicyError, match=r"yaml:\d+:\d+  runtime.served_name  differs from base.yaml, and is no"
    ):
        variants(file, load_hypothesis(file))


def test_a_patch_replaces_whole_and_leaves_the_rest() -> None:
    data = {"version": 1, "runtime": {"model": "pocket", "speculation": {"proposer": "ngram"}}}
    changed = patched(data, {"runtime.speculation": "off", "gateway.routing.policy": "cost"})
    assert changed["runtime"] == {"model": "pocket", "speculation": "off"}
    assert changed["gateway"] == {"routing": {"policy": "cost"}}
    assert data["runtime"]["speculation"] == {"proposer": "ngram"}  # type: ignore[index]


def test_every_knob_is_a_field_of_policies_and_some_change_may_touch_it() -> None:
    fields = {path for path, _ in every_field(Deployment)}
    assert set(KNOBS) <= fields
    assert all(kinds_for(knob) for knob in KNOBS)
    assert not allowed("lossless_exact", "runtime.weights")
    assert not allowed("lossy_model", "gateway.trim")


def test_the_schema_takes_what_the_loader_takes(tmp_path: Path) -> None:
    """`headgate gate schema` is for editors: it must know percent and times."""
    schema = Hypothesis.model_json_schema()
    data, _, _ = parse("x", WHOLE)
    jsonschema.validate(data, schema)
    data["claims"][0]["min_effect"] = "8 percent"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema)


def test_every_field_has_its_line_in_the_documentation() -> None:
    """docs/hypothesis.md says the meaning of all that the schema knows, in the same words."""
    page = (ROOT / "docs" / "hypothesis.md").read_text()
    for path, field in every_field(Hypothesis):
        line = next((line for line in page.splitlines() if f"| `{path}` |" in line), None)
        assert line, f"{path} is not in docs/hypothesis.md"
        assert field.description in line, f"{path} is described differently there"


def test_every_knob_has_its_line_in_the_documentation() -> None:
    page = (ROOT / "docs" / "hypothesis.md").read_text()
    for knob, kind in KNOBS.items():
        assert f"| `{knob}` | `{kind}` |" in page
