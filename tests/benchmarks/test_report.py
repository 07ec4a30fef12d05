"""What every benchmark prints: the JSON object, the table, the page, the exit code."""

from __future__ import annotations

import getpass
import importlib
import json
import socket

import jsonschema
import pytest

from benchmarks import __main__ as everything
from benchmarks.lab import conditions, report
from benchmarks.lab.report import SCHEMA, About, Goal, Measured, MeasurementFailed, run

TOY = About(
    name="toy",
    measures="Counts to ten.",
    goals=(
        Goal("count", 5, "at most", "a count of at most 5"),
        Goal("speed_per_s", 5, "at least", "a speed of at least 5 a second"),
    ),
)


def count(settings):
    settings.progress("counting")
    results = {"count": 10, "runs_s": [0.25, 1], "of": {"letters": {"p50": 1.5, "p95": 2000.0}}}
    values = {"count": 10, "speed_per_s": 7.5}
    return Measured(results, values, {"model": "none"})


def fail(_settings):
    raise MeasurementFailed("the abacus is broken")


def last_object(text):
    return json.loads(text.splitlines()[-1])


def test_json_is_one_object_in_the_last_line_and_progress_goes_to_stderr(capsys):
    assert run(TOY, count, ["--json", "--quick"]) == 0
    out, err = capsys.readouterr()
    outcome = last_object(out)
    jsonschema.validate(outcome, SCHEMA)
    assert out.count("\n") == 1
    assert outcome["conditions"]["quick"] is True
    assert outcome["conditions"]["model"] == "none"
    assert "counting" in err


def test_a_missed_goal_is_an_outcome_and_no_failure(capsys):
    assert run(TOY, count, ["--json"]) == 0
    goals = last_object(capsys.readouterr().out)["goals"]
    assert goals == [
        {"name": "count", "value": 10, "goal": 5, "met": False},
        {"name": "speed_per_s", "value": 7.5, "goal": 5, "met": True},
    ]


@pytest.mark.parametrize(("direction", "below"), [("at most", True), ("at least", False)])
def test_a_goal_is_met_at_its_very_number(direction, below):
    goal = Goal("one", 1.0, direction, "one")
    assert goal.met_by(1.0)
    assert goal.met_by(0.5) is below
    assert goal.met_by(1.5) is not below


def test_without_json_a_table_shows_results_and_goals(capsys):
    assert run(TOY, count, []) == 0
    out = capsys.readouterr().out
    for text in ("of.letters", "p50: 1.500 · p95: 2,000.0", "at most 5", "missed", "met"):
        assert text in out


def test_a_measurement_that_fails_says_why_and_prints_no_object(capsys):
    assert run(TOY, fail, ["--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "abacus" in err


def test_a_goal_without_a_value_is_a_mistake_of_the_benchmark():
    with pytest.raises(KeyError, match="count"):
        report.tell(TOY, Measured({"a": 1}, {}), {})


def test_conditions_name_no_host_no_user_and_no_path():
    found = {"quick": False, "load_at_end": 0.0, **conditions.gather()}
    jsonschema.validate(found, SCHEMA["properties"]["conditions"])
    words = " ".join(str(value) for value in found.values()).split()
    assert not [word for word in words if word.startswith("/")]
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words


def test_the_page_is_the_same_for_the_same_outcomes(capsys):
    run(TOY, count, ["--json"])
    outcome = last_object(capsys.readouterr().out)
    page = everything.page([(TOY, outcome)])
    assert page == everything.page([(TOY, outcome)])
    assert "## toy" in page
    assert "python -m benchmarks.toy" in page
    assert "| a count of at most 5 | 10 | missed |" in page


def test_all_together_have_the_shape_of_one(capsys):
    run(TOY, count, ["--json"])
    outcome = last_object(capsys.readouterr().out)
    whole = everything.together([(TOY, outcome)], quick=True)
    jsonschema.validate(whole, SCHEMA)
    assert [goal["name"] for goal in whole["goals"]] == ["toy.count", "toy.speed_per_s"]
    assert whole["results"] == {"toy": outcome["results"]}


# ---- every benchmark ----------------------------------------------------------------------------


def test_there_are_benchmarks():
    assert "first_stream" in everything.modules()


@pytest.mark.parametrize("name", everything.modules())
def test_every_benchmark_says_what_it_measures_and_takes_the_same_options(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.ABOUT.name == name
    assert len(module.ABOUT.measures) > 100
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for text in ("--json", "--quick", *(goal.text for goal in module.ABOUT.goals)):
        assert text in told


@pytest.mark.parametrize("name", everything.modules())
def test_every_benchmark_refuses_options_that_it_does_not_know(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--sometimes"])
    assert ended.value.code == 2
    assert "--sometimes" in capsys.readouterr().err


def test_the_page_has_a_section_for_every_benchmark_without_peers():
    if not everything.PAGE.exists():
        pytest.skip("`make bench` has not written docs/benchmarks.md yet")
    page = everything.PAGE.read_text(encoding="utf-8")
    for about in everything.without_peers():
        assert f"## {about.name}\n" in page
        assert about.command in page
