"""What is chosen by measurement, over real workers: alike on one machine, and told where it is not.

Each has the measured part of a home to itself, so that none knows what was chosen before.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from command.machine import free_ports
from tests.end_to_end.stack import POLICY, PROBE, START_S, Program, program, ready, until

MEASURED = "runtime.choices: measured "


@contextlib.contextmanager
def workers(*folders: Path) -> Iterator[list[Program]]:
    """One worker for each home, all started at the same time."""
    with contextlib.ExitStack() as stop, pytest.MonkeyPatch.context() as patch:
        found = []
        patch.delenv("HEADGATE_WAYS", raising=False)
        for folder, port in zip(folders, free_ports(len(folders)), strict=True):
            patch.setenv("XDG_CACHE_HOME", str(folder))
            policy = folder / "policy.yaml"
            policy.write_text(POLICY)
            found.append(stop.enter_context(program(folder, "runtime", policy, port)))
        for one in found:
            until(lambda: ready(one), START_S, lambda: one.log.read_text())  # noqa: B023
        yield found


def told(one: Program) -> Mapping[str, Any]:
    return dict(PROBE.get(f"{one.url}/v1/fingerprint").json())


def held(fingerprint: Mapping[str, Any]) -> Counter[str]:
    """Layers by way, over all shapes."""
    count: Counter[str] = Counter()
    for ways in fingerprint["facts"]["arithmetic"]["layers"].values():
        count.update(ways)
    return count


def measured(*those: Program) -> list[str]:
    """What they say that they have measured."""
    lines = [line for one in those for line in one.log.read_text().splitlines()]
    said = [line.partition(MEASURED)[2] for line in lines if MEASURED in line]
    return sorted(line.partition(":")[0] for line in said)


def ways_in(home: Path) -> Path:
    return home / "headgate" / "native" / "ways.json"


def write(home: Path, text: str) -> Path:
    ways_in(home).parent.mkdir(parents=True)
    ways_in(home).write_text(text)
    return home


def others(choice: Mapping[str, str]) -> dict[str, str]:
    """For each question another of its ways."""
    turned = {}
    for name, chosen in choice.items():
        among = name.partition(": ")[2].split(", ")
        turned[name] = next(way for way in among if way != chosen)
    return turned


def test_workers_of_one_machine_choose_alike_and_another_choice_is_another_fingerprint(
    tmp_path: Path,
) -> None:
    """Two that start at once share what each shape's measurement gave, whoever made it. Then three
    more. One finds other choices: it holds its layers so, and its fingerprint differs in that leaf
    and no other. One finds a file that was cut: it measures, and says why. One finds what another
    processor has chosen: it measures, and leaves that to the other."""
    home, turned, cut, foreign = (tmp_path / name for name in ("one", "turned", "cut", "foreign"))
    home.mkdir()
    with workers(home, home) as both:
        first, second = map(told, both)
        assert first == second
        assert both[0].health()["weights"] == both[1].health()["weights"]
        questions = measured(*both)
        assert len(questions) == len(set(questions)) > 1
    kept = json.loads(ways_in(home).read_text())
    ((machine, mine),) = kept["machines"].items()
    assert len(mine["chosen"]) == len(questions)

    other = others(mine["chosen"])
    planted = kept | {"machines": {machine: mine | {"chosen": other}}}
    write(turned, json.dumps(planted))
    write(cut, json.dumps(kept)[:-20])
    theirs = {"machine": mine["machine"] | {"processor": "another"}, "chosen": other}
    write(foreign, json.dumps(kept | {"machines": {"another": theirs}}))
    with workers(turned, cut, foreign) as (odd, again, stranger):
        assert measured(odd) == []
        differs = told(odd)
        leaves = [name for name, leaf in first["leaves"].items() if differs["leaves"][name] != leaf]
        assert leaves == ["arithmetic"]
        assert differs["system_fingerprint"] != first["system_fingerprint"]
        assert set(held(differs)) == set(other.values())
        assert held(differs) == odd.health()["weights"] != held(first)
        assert measured(again) == measured(stranger) == questions
        assert "is not believed" in again.log.read_text()
        assert "is not believed" not in stranger.log.read_text()
    assert json.loads(ways_in(turned).read_text()) == planted
    assert len(json.loads(ways_in(cut).read_text())["machines"]) == 1
    assert json.loads(ways_in(foreign).read_text())["machines"]["another"] == theirs
