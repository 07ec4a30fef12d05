"""What a policy may enable: a live pass for exactly what would be served, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policies.binding import ledger_of, pair
from policies.devices import DevicesUnknown
from policies.effects import EFFECTS, effect
from policies.enabling import gated, news, rows
from policies.leaves import OWN, PLACES, SCHEDULING, Binder, numerics, transport
from policies.ledger import LINES, VERDICTS
from policies.load import PolicyError, load, load_hypothesis
from policies.schema import Gateway, Runtime
from tests.policies.gated_world import DAY, DEVICES, GUARDRAILS, NOW, POLICY, World, build


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build(tmp_path)


def never() -> Any:
    raise AssertionError("nobody needs to know the device")


# ---- what enables -------------------------------------------------------------------------------


def test_without_optimizations_nothing_is_asked_and_nothing_changes(world: World) -> None:
    """No ledger is read, no weight hashed, no device asked for."""
    (world.folder / ".headgate").write_text("no folder")
    (world.folder / "tiny" / "model.safetensors").unlink()
    found = world.gated(devices=never)
    assert found.deployment == load(world.policy)
    assert (found.standings, rows(found)) == ((), [])


def test_an_optimization_without_a_verdict_is_off_and_says_what_to_do(world: World) -> None:
    file = world.hypothesis("int8")
    world.serve("int8")
    found = world.gated(devices=never)
    assert found.deployment.runtime == load(world.policy).runtime
    (row,) = rows(found)
    assert row == ("optimization int8", "off", f"there is no verdict: headgate gate run {file}")


def test_a_live_pass_applies_its_patch(world: World) -> None:
    world.hypothesis("int8", "{runtime.weights: w8a8, runtime.kv: int8}")
    world.judge("int8")
    world.serve("int8")
    found = world.gated()
    assert found.deployment.runtime is not None
    assert found.deployment.runtime.weights.mlp == "w8a8"
    assert found.deployment.runtime.kv == "int8"
    (row,) = rows(found)
    assert row[:2] == ("optimization int8", "on")
    assert "runtime.weights, runtime.kv: passed on 2023-11-14, holds until 2023-12-14" in row[2]
    (told,) = found.payload()
    assert told["enabled"] is True
    assert told["verdict"] == "pass"
    json.dumps(told)


@pytest.mark.parametrize(
    ("decision", "state"),
    [("fail", "off"), ("no_benefit", "off"), ("inconclusive", "off"), ("invalid", "off")],
)
def test_any_other_verdict_does_not(world: World, decision: str, state: str) -> None:
    world.hypothesis("int8")
    world.judge("int8", decision)
    world.serve("int8")
    found = world.gated()
    assert found.deployment.runtime == load(world.policy).runtime
    assert found.standings[0].state == state
    assert decision in found.standings[0].why


def test_a_pass_for_a_and_a_pass_for_b_are_none_for_both(world: World) -> None:
    """Each was judged on the bare policy: the second is stale on top of the first, on alone."""
    world.hypothesis("int8")
    world.hypothesis("kv", "{runtime.kv: int8}")
    world.judge("int8")
    world.judge("kv")
    world.serve("int8", "kv")
    found = world.gated()
    assert world.states() == {"int8": "on", "kv": "stale"}
    assert found.standings[1].leaves == ("numerics",)
    world.serve("kv")
    assert world.states() == {"kv": "on"}


def test_one_that_was_judged_on_top_of_another_needs_it(world: World) -> None:
    """The second passed over a baseline that has the first: without it, it is stale."""
    world.hypothesis("int8")
    world.judge("int8")
    world.hypothesis("kv", "{runtime.kv: int8}")
    world.policy.write_text(POLICY.replace("threads: 1", "threads: 1, weights: w8a8"))
    world.judge("kv")
    world.serve("int8", "kv")
    assert world.states() == {"int8": "on", "kv": "on"}
    world.ledger.quarantine("int8", "", "looped", evidence=world.gated().standings[0].evidence)
    assert world.states() == {"int8": "quarantined", "kv": "stale"}
    assert world.gated().deployment.runtime == load(world.policy).runtime


def test_a_later_fail_takes_a_pass_back_and_a_later_pass_gives_it_again(world: World) -> None:
    world.hypothesis("int8")
    world.serve("int8")
    for at, decision, state in (
        (0.0, "pass", "on"),
        (1.0, "fail", "off"),
        (2.0, "invalid", "off"),
        (3.0, "pass", "on"),
        (4.0, "inconclusive", "on"),
    ):
        world.judge("int8", decision, NOW + at)
        assert world.states(now=NOW + 10) == {"int8": state}, decision


# ---- what makes it stale ------------------------------------------------------------------------


def flip(file: Path, at: int = -2) -> None:
    body = bytearray(file.read_bytes())
    body[at] ^= 1
    file.write_bytes(body)


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


ALL = {"suite-a", "suite-b", "speed", "targets"}
# One change -> the leaf that differs, and the hypotheses of which no verdict holds any more.
CHANGES: dict[str, tuple[Callable[[Path], None], str, set[str]]] = {
    "a byte of the weights": (lambda at: flip(at / "tiny/model.safetensors"), "weights", ALL),
    "a byte of the tokenizer": (
        lambda at: rewrite(at / "tiny/tokenizer.json", "{}", "[]"), "tokenizer", ALL),
    "a byte of the template": (
        lambda at: rewrite(at / "tiny/tokenizer_config.json", "messages", "message!"),
        "template", ALL),
    "how numbers are kept": (
        lambda at: rewrite(at / "policy.yaml", "threads: 1", "threads: 1, dtype: bf16"),
        "numerics", ALL),
    "a batch": (
        lambda at: rewrite(at / "policy.yaml", "threads: 1", "threads: 2"), "batching", ALL),
    "a trim": (
        lambda at: rewrite(at / "policy.yaml", "version: 1",
                           "version: 1\ngateway: {trim: {drop: oldest}}"), "trim", ALL),
    "routing": (
        lambda at: rewrite(at / "policy.yaml", "version: 1",
                           "version: 1\ngateway: {routing: {policy: p2c}}"), "routing", ALL),
    "a target": (
        lambda at: rewrite(at / "policy.yaml", "version: 1",
                           "version: 1\ngateway: {tiers: {standard: {ttft_ms: 1}}}"),
        "slo", {"targets"}),
    "a tier's queue": (
        lambda at: rewrite(at / "policy.yaml", "version: 1",
                           "version: 1\ngateway: {tiers: {standard: {queue_max: 1}}}"),
        "scheduling", ALL),
    "retries": (
        lambda at: rewrite(at / "policy.yaml", "version: 1",
                           "version: 1\ngateway: {retries: {max_attempts: 1}}"),
        "transport", ALL),
    "a row of suite a": (
        lambda at: rewrite(at / "a.jsonl", "ho", "hu"), "suite:a", {"suite-a"}),
    "what suite b asks": (
        lambda at: rewrite(at / "b.yaml", "name: b", "name: bb"), "suite:b", {"suite-b"}),
    "a scorer of suite a": (
        lambda at: rewrite(at / "a.yaml", "kind: exact", "kind: regex"),
        "scorers:a", {"suite-a"}),
    "a judge of suite b": (
        lambda at: rewrite(at / "b.yaml", "model: big", "model: other"),
        "judge:b", {"suite-b"}),
    "recorded traffic": (
        lambda at: rewrite(at / "week.jsonl", "hi", "ha"), "replay:week", {"speed", "targets"}),
    "the margin of one": (
        lambda at: rewrite(at / "suite-a.yaml", "margin: 0.02", "margin: 0.03"),
        "hypothesis", {"suite-a"}),
    "who answers for one": (
        lambda at: rewrite(at / "suite-a.yaml", "{name: suite-a}", "{name: suite-a, owner: me}"),
        "", set()),
    "a port": (
        lambda at: rewrite(at / "policy.yaml", "version: 1", "version: 1\ngateway: {port: 9}"),
        "", set()),
    "a comment": (
        lambda at: rewrite(at / "a.yaml", "kind: Suite", "kind: Suite  # of a"), "", set()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_makes_exactly_its_verdicts_stale(world: World, change: str) -> None:
    """One leaf differs; it is told, and only what was found on it has to be found again."""
    make, leaf, stale = CHANGES[change]
    for name, guardrail in GUARDRAILS.items():
        world.hypothesis(name, guardrail=guardrail)
        world.judge(name)
    for name in GUARDRAILS:  # each alone: a second one would be on top of the first
        world.serve(name)
        assert world.states() == {name: "on"}
    make(world.folder)
    base = world.policy.read_text().partition("optimizations:")[0]
    found = {}
    for name in GUARDRAILS:
        world.serve(name, text=base)
        (one,) = world.gated().standings
        found[name] = one
        assert one.enabled is (one.state == "on")
    assert {name for name, one in found.items() if one.state == "stale"} == stale
    assert {name for name, one in found.items() if one.state == "on"} == ALL - stale
    for name in stale:
        assert found[name].leaves == (leaf,)
        assert found[name].why.startswith(f"{leaf} has changed since its verdict: headgate gate")


def test_another_device_makes_times_stale_and_answers_to_be_checked(world: World) -> None:
    for name in ("suite-a", "speed"):
        world.hypothesis(name, guardrail=GUARDRAILS[name])
        world.judge(name)
    other = {"auto": {**DEVICES["auto"], "name": "Other CPU"}}
    effects = {}
    for name in ("suite-a", "speed"):
        world.serve(name)
        (one,) = world.gated(devices=lambda: other).standings
        assert (one.state, one.leaves) == ("stale", ("device",))
        effects[name] = [spoil.effect for spoil in one.spoiled]
    assert effects == {"suite-a": ["check"], "speed": ["stale"]}


def test_time_makes_a_verdict_stale(world: World) -> None:
    """By the verdict's own end, and by the policy's where that comes first."""
    world.hypothesis("int8")
    world.judge("int8")
    world.serve("int8")
    assert world.states(now=NOW + 30 * DAY - 1) == {"int8": "on"}
    (one,) = world.gated(now=NOW + 30 * DAY).standings
    assert (one.state, one.leaves) == ("stale", ("age",))
    assert one.why.startswith("its verdict is 30 days old")
    world.serve("int8", gate="{max_age: 7d}")
    assert world.states(now=NOW + 7 * DAY - 1) == {"int8": "on"}
    assert world.states(now=NOW + 7 * DAY) == {"int8": "stale"}


def test_what_cannot_be_told_enables_nothing(world: World) -> None:
    """A device, a suite or a replay that is not there: stale, with the reason."""

    def unknown() -> Any:
        raise DevicesUnknown("torch is not installed")

    world.hypothesis("int8")
    world.judge("int8")
    world.serve("int8")
    (one,) = world.gated(devices=unknown).standings
    assert (one.state, one.enabled, one.why) == ("stale", False, "torch is not installed")
    (world.folder / "a.jsonl").unlink()
    (one,) = world.gated().standings
    assert one.state == "stale"
    assert "a.jsonl: No such file" in one.why


def test_a_leaf_that_nobody_knows_spoils_everything() -> None:
    assert effect("new-in-a-later-version", "suite:a", "correct") == "stale"
    assert effect("suite:b", "suite:a", "correct") is None
    assert effect("slo", "replay:x", "ttft.p99") is None
    assert effect("slo", "replay:x", "goodput") == "stale"


def test_every_leaf_has_its_row_and_every_field_its_leaf(world: World) -> None:
    """A field of a later version has to be given a place; until then it speaks of answers."""
    side = Binder(world.policy, lambda: DEVICES).side(load(world.policy))
    assert set(side.leaves) <= set(EFFECTS)
    assert set(numerics(Runtime)) == {
        "dtype", "weights", "kv", "compile", "speculation", "context_tokens",
    }  # fmt: skip
    placed = (*OWN, *SCHEDULING, *PLACES, *transport(Gateway))
    assert sorted(placed) == sorted(Gateway.model_fields)


# ---- damage, quarantine, how far the policy insists ---------------------------------------------


def test_a_quarantine_is_told_and_needs_newer_evidence(world: World) -> None:
    world.hypothesis("int8")
    made = world.judge("int8")
    world.serve("int8")
    world.ledger.quarantine("int8", made.candidate, "5xx above 2 %", at=NOW + 5)
    (one,) = world.gated(now=NOW + 6).standings
    assert (one.state, one.enabled) == ("quarantined", False)
    assert one.why.startswith("5xx above 2 %")
    world.judge("int8", at=NOW + 10)
    assert world.states(now=NOW + 11) == {"int8": "on"}


def test_a_quarantine_of_what_runs_now_holds_though_the_verdict_is_of_an_older_root(
    world: World,
) -> None:
    """A target changed, which spoils nothing here: the candidate that was rolled back has another
    root than the one that was judged, and is still the same candidate."""
    world.hypothesis("int8")
    world.judge("int8")
    base = POLICY + "gateway: {tiers: {standard: {ttft_ms: 1}}}\n"
    world.serve("int8", text=base)
    (one,) = world.gated().standings
    assert one.state == "on"
    world.ledger.quarantine("int8", one.candidate, "looped", at=NOW + 5)
    assert world.states(now=NOW + 6) == {"int8": "quarantined"}


def test_a_ledger_that_was_tampered_with_or_cannot_be_read_enables_nothing(world: World) -> None:
    world.hypothesis("int8")
    made = world.judge("int8")
    world.serve("int8")
    file = world.ledger.folder / VERDICTS / f"{made.evidence}.json"
    body = file.read_bytes()
    file.write_bytes(body.replace(b"pass", b"Pass"))
    (one,) = world.gated().standings
    assert (one.state, one.enabled) == ("stale", False)
    assert "is not what was recorded" in one.why
    file.write_bytes(body)
    lines = world.ledger.folder / LINES
    lines.rename(lines.with_suffix(".old"))
    lines.mkdir()
    (one,) = world.gated().standings
    assert (one.state, one.enabled) == ("off", False)
    assert "decisions.jsonl cannot be read" in one.why


def test_damaged_lines_are_told(world: World) -> None:
    world.hypothesis("int8")
    world.judge("int8")
    world.serve("int8")
    with (world.ledger.folder / LINES).open("ab") as file:
        file.write(b"junk\n")
    found = world.gated()
    assert found.standings[0].state == "on"
    assert rows(found)[-1] == ("ledger", "damaged", "no decision can be read from line 2")


def test_a_policy_that_only_warns_serves_what_is_stale_and_not_what_failed(world: World) -> None:
    world.hypothesis("int8")
    world.serve("int8", gate="{enforce: warn}")
    (one,) = world.gated().standings
    assert (one.state, one.enabled) == ("off", True)
    made = world.judge("int8", at=NOW - 40 * DAY)
    (one,) = world.gated().standings
    assert (one.state, one.enabled) == ("stale", True)
    assert rows(world.gated())[0][1] == "stale, served"
    world.judge("int8", "fail", at=NOW)
    assert world.gated().standings[0].enabled is False
    world.judge("int8", at=NOW + 1)
    world.ledger.quarantine("int8", made.candidate, "looped", at=NOW + 2)
    (one,) = world.gated(now=NOW + 3).standings
    assert (one.state, one.enabled) == ("quarantined", False)


def test_a_policy_that_does_not_ask_serves_everything(world: World) -> None:
    world.hypothesis("int8")
    world.serve("int8", gate="{enforce: 'off'}")
    found = world.gated(devices=never)
    assert found.deployment.runtime is not None
    assert found.deployment.runtime.weights.mlp == "w8a8"
    assert rows(found)[0] == ("optimization int8", "on", "gate.enforce is off: nobody asked")


def test_lossy_knobs_that_the_policy_sets_itself_are_told(world: World) -> None:
    """Not those at their default, and not the model, which is what is served."""
    world.policy.write_text(
        "version: 1\ngateway: {trim: {drop: oldest}}\nruntime: {model: tiny, kv: int8}\n"
    )
    found = world.gated(devices=never)
    assert found.ungated == ("gateway.trim", "runtime.kv")
    assert [row[1] for row in rows(found)] == ["ungated", "ungated"]


# ---- beside what serves -------------------------------------------------------------------------


def test_what_only_a_restart_can_change_stays_as_it_began(world: World) -> None:
    """A policy that is read again: weights go on as they are, trimming obeys at once."""
    world.hypothesis("int8")
    world.hypothesis("trim", "{gateway.trim.drop: oldest}", "lossy_input")
    world.judge("int8")
    world.serve("int8", "trim")
    began = world.gated()
    assert began.states == "int8=on trim=off-"
    later = world.gated(now=NOW + 40 * DAY, serving=began)
    assert later.deployment.runtime == began.deployment.runtime
    assert later.standings[0].state == "stale"
    assert later.standings[0].why.endswith("it is served until the next start")
    off = world.gated(now=NOW + 40 * DAY)
    world.judge("int8", at=NOW + 40 * DAY)
    again = world.gated(now=NOW + 40 * DAY, serving=off)
    assert again.deployment.runtime == off.deployment.runtime
    assert rows(again)[0][1:] == ("off", "it is served from the next start")


def test_what_was_told_already_is_not_told_again(world: World) -> None:
    world.hypothesis("int8")
    world.serve("int8")
    found = world.gated()
    assert news(found, {}) == rows(found)
    assert news(found, {"HEADGATE_OPTIMIZATIONS": found.states}) == []
    assert news(found, {"HEADGATE_OPTIMIZATIONS": "int8=on"}) == rows(found)


# ---- policies that are wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("name: x", "name: X"), "x.yaml:3:18  metadata.name  expected text that matches"),
        (("baseline: {config: policy.yaml}", "baseline: {url: 'http://h:1'}"), "give `config`"),
        (("candidate: {", "candidate: {config: other.yaml, "), "is another policy file"),
        (("w8a8", "w9"), "runtime.weights"),
    ],
)
def test_a_hypothesis_that_no_policy_can_enable_is_told(
    world: World, change: tuple[str, str], told: str
) -> None:
    rewrite(world.hypothesis("x"), *change)
    world.serve("x")
    with pytest.raises(PolicyError) as caught:
        world.gated()
    assert told in str(caught.value)


def test_optimizations_that_are_not_there_or_twice_are_told_at_their_line(world: World) -> None:
    world.hypothesis("x")
    world.serve("gone")
    with pytest.raises(PolicyError, match=r"policy.yaml:4:\d+  optimizations\[0\].hypothesis"):
        world.gated()
    world.serve("x", "x")
    with pytest.raises(PolicyError, match=r"policy.yaml:5:\d+ .* 'x' is named twice"):
        gated(world.policy, load(world.policy), NOW, lambda: DEVICES)


# ---- what a gate compares -----------------------------------------------------------------------


def test_a_gate_compares_on_top_of_what_is_on_and_stands_before(world: World) -> None:
    """The policy names both; the second is judged with the first in both arms, and neither arm has
    optimizations of its own."""
    world.hypothesis("int8")
    world.hypothesis("kv", "{runtime.kv: int8}")
    world.judge("int8")
    world.serve("int8", "kv")
    file = world.folder / "kv.yaml"

    def compared() -> list[tuple[str, str]]:
        found = []
        for one in pair(file, load_hypothesis(file), NOW + 1, lambda: DEVICES):
            assert one is not None
            assert one.deployment.optimizations == ()
            assert not {"optimizations", "gate"} & set(one.data)
            assert one.deployment.runtime is not None
            found.append((one.deployment.runtime.weights.mlp, one.deployment.runtime.kv))
        return found

    assert compared() == [("w8a8", "auto"), ("w8a8", "int8")]
    world.ledger.quarantine("int8", world.gated().standings[0].candidate, "looped", at=NOW)
    assert compared() == [("auto", "auto"), ("auto", "int8")]


def test_judging_it_again_compares_with_the_policy_without_it(world: World) -> None:
    """That it is on now does not put it into the baseline; what it then enables is what it was."""
    world.hypothesis("int8")
    world.serve("int8")
    for at in (0.0, 1.0):
        world.judge("int8", at=NOW + at)
        assert world.states(now=NOW + 2) == {"int8": "on"}
    first, second = world.ledger.verdicts()
    assert (first.baseline, first.candidate) == (second.baseline, second.candidate)


def test_verdicts_lie_where_the_policy_says_else_beside_the_hypothesis(world: World) -> None:
    file = world.hypothesis("int8")
    hypothesis = load_hypothesis(file)
    assert ledger_of(file, hypothesis) == world.ledger
    world.serve("int8", gate="{ledger: kept/here}")
    there = ledger_of(file, hypothesis)
    assert there.folder == world.folder / "kept" / "here"
    world.judge("int8")
    assert world.states() == {"int8": "off"}
    world.ledger.folder.rename(world.folder / "kept.tmp")
    there.folder.parent.mkdir()
    (world.folder / "kept.tmp").rename(there.folder)
    assert world.states() == {"int8": "on"}
