"""Rows: made again from their arguments, split by their words, and answerable from their prompt."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from pocket import tasks, words
from pocket.errands import INTENTS
from pocket.tasks import TASKS, Row, row, rows

COUNT = 60


def last_user(item: Row) -> str:
    return str(item.messages[-1]["content"])


def every_text(item: Row) -> list[str]:
    """What a row says, without the shared system prompts."""
    said = [str(m["content"]) for m in item.messages if m["role"] != "system"]
    return [*said, item.answer]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_row(task: str) -> None:
    """A row depends on its task, split, seed and index and on nothing else."""
    many = list(rows(task, "test", 5, 4))
    assert many[3] == row(task, "test", 5, 3)
    assert many[3] != row(task, "test", 6, 3)
    assert many[3].messages != row(task, "train", 5, 3).messages


def test_an_unknown_task_or_split_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="task is 'poem', expected one of answer"):
        row("poem", "test", 0, 0)
    with pytest.raises(ValueError, match="split is 'dev', expected one of train, test"):
        row("answer", "dev", 0, 0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", words.SPLITS)
def test_numbers_above_31_belong_to_the_split_of_their_row(task: str, split: str) -> None:
    """Every run of digits in a row, codes and sums included, obeys the split."""
    for item in rows(task, split, 0, COUNT):
        for text in every_text(item):
            assert words.numbers_fit(text, split), text


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", words.SPLITS)
def test_names_belong_to_the_split_of_their_row(task: str, split: str) -> None:
    """A capitalized word made of the syllables is a drawn name, and obeys the split."""
    syllables = "|".join(sorted(words.SYLLABLES, key=len, reverse=True))
    made_up = re.compile(rf"\b(?=[A-Z])(?i:(?:{syllables}){{2,3}})\b")
    for item in rows(task, split, 0, COUNT):
        for text in every_text(item):
            for name in made_up.findall(text):
                if name in words.NEVER_NAMES:
                    continue
                assert words.held_out(name) == (split == "test"), name


def test_a_quarter_of_the_names_is_held_out() -> None:
    rng = random.Random(0)
    names = {"".join(rng.choices(words.SYLLABLES, k=2)).capitalize() for _ in range(4000)}
    assert 0.2 < sum(map(words.held_out, names)) / len(names) < 0.3


# Independent readers: each finds the answer in the prompt by other means than the generator.

_RECORD = re.compile(r"(?P<e>.+) (?P<a>\w+): (?P<v>[^:]+)\.")
_QUESTION = re.compile(
    r"What is the (?P<a1>\w+) of (?P<e1>.+)\?|Which (?P<a2>\w+) does (?P<e2>.+) have\?"
    r"|Please tell me the (?P<a3>\w+) of (?P<e3>.+)\.|(?P<e4>.+): what is the (?P<a4>\w+)\?"
    r"|I need the (?P<a5>\w+) of (?P<e5>.+)\."
)


def parts(match: re.Match[str]) -> dict[str, str]:
    """The named groups by their first letter; an order opens a line with a capital."""
    named = {name[0]: text for name, text in match.groupdict().items() if text}
    return {letter: re.sub("^Order ", "order ", text) for letter, text in named.items()}


def read_sheet(text: str) -> dict[tuple[str, str], str]:
    sheet = {}
    for line in text.split("\n\n")[0].splitlines()[1:]:
        match = _RECORD.fullmatch(line)
        assert match, line
        got = parts(match)
        assert (got["e"], got["a"]) not in sheet
        sheet[got["e"], got["a"]] = got["v"]
    return sheet


def read_question(text: str) -> tuple[str, str]:
    match = _QUESTION.fullmatch(text.split("\n\n")[-1])
    assert match, text
    return parts(match)["e"], parts(match)["a"]


def tell(sheet: dict[tuple[str, str], str], entity: str, attribute: str) -> str:
    value = sheet.get((entity, attribute), "Not in the facts")
    return f"{entity[0].upper()}{entity[1:]} {attribute}: {value}."


def solve_facts(item: Row) -> str:
    return tell(read_sheet(last_user(item)), *read_question(last_user(item)))


def solve_talk(item: Row) -> str:
    users = [str(m["content"]) for m in item.messages if m["role"] == "user"]
    if not users[0].startswith("Facts"):
        told = dict(re.findall(r"my (name|city|order) is ([\w-]+)", users[0]))
        asked = {"Who": "name", "Where": "city", "Which city": "city"}
        kind = next((k for opening, k in asked.items() if users[-1].startswith(opening)), None)
        kind = kind or ("name" if "name" in users[-1] else "order")
        return f"Your {kind} is {told[kind]}."
    entity, attribute = read_question(users[0])
    another_attribute = re.fullmatch(r"(?:And|What about) (?:the|which) (\w+)\?", users[-1])
    another_entity = re.fullmatch(r"(?:And of|What about|And for) (.+)\?", users[-1])
    if another_attribute:
        attribute = another_attribute[1]
    else:
        assert another_entity
        entity = another_entity[1]
    return tell(read_sheet(users[0]), entity, attribute)


def solve_extract(item: Row) -> str:
    request, letter = last_user(item).split(": ", 1)
    found: dict[str, Any] = dict(re.findall(r"(name|city|order|amount) is ([\w-]+)", letter))
    found["amount"] = int(found["amount"])
    fields = re.findall("name|city|order|amount", request)
    return json.dumps({field: found[field] for field in fields})


def solve_classify(item: Row) -> str:
    text = last_user(item)
    fitting = set()
    for intent, cores in INTENTS.items():
        for core in cores:
            literal = [re.escape(part) for part in re.split(r"\{\w+\}", core)]
            if re.search(r"[\w -]+".join(literal), text, re.IGNORECASE):
                fitting.add(intent)
    assert len(fitting) == 1, (text, fitting)
    return fitting.pop()


def solve_total(item: Row) -> str:
    prices = [int(price) for price in re.findall(r"(\d+) euros", last_user(item))]
    sums = [sum(prices[: count + 1]) for count in range(len(prices))]
    steps = []
    for i, price in enumerate(prices[1:]):
        tens = sum(int(f"{number:02}"[:-1]) for number in (sums[i], price))
        ones = sum(int(str(number)[-1]) for number in (sums[i], price))
        steps.append(f"{sums[i]} + {price} = {tens} tens + {ones} = {sums[i + 1]}")
    return f"{', '.join(steps)}. Total: {sums[-1]} euros"


def solve_rewrite(item: Row) -> str:
    text = last_user(item)
    if "amount" in text:
        *euros, cents = re.findall(r"\d+", text)
        return f"EUR {''.join(euros)}.{int(cents):02}"
    month = next((i for i, m in enumerate(words.MONTHS, 1) if m in text), None)
    numbers = re.findall(r"\d+", text)
    day = int(numbers[0])
    return f"{numbers[-1]}-{month or int(numbers[1]):02}-{day:02}"


def solve_repeat(item: Row) -> str:
    text = last_user(item)
    asked = re.search(r"the (order|parcel|ticket|shelf) code", text)
    assert asked
    code = re.search(rf"the {asked[1]} is ([A-Z\d-]+)", text)
    assert code
    return f"The {asked[1]} is {code[1]}."


def solve_tool(item: Row) -> str:
    """The call names an offered tool, and its arguments stand in the request word for word."""
    assert item.tools
    body = item.answer.removeprefix("<tool_call>").removesuffix("</tool_call>")
    call = json.loads(body)
    offered = {tool["function"]["name"]: tool["function"] for tool in item.tools}
    wanted = offered[call["name"]]["parameters"]
    assert list(call["arguments"]) == wanted["required"]
    assert all(str(value) in last_user(item) for value in call["arguments"].values())
    return f"<tool_call>{json.dumps(call)}</tool_call>"


SOLVERS = {
    "answer": solve_facts,
    "find": solve_facts,
    "unknown": solve_facts,
    "extract": solve_extract,
    "classify": solve_classify,
    "total": solve_total,
    "rewrite": solve_rewrite,
    "repeat": solve_repeat,
    "tool": solve_tool,
    "talk": solve_talk,
}


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_prompt(task: str) -> None:
    """An independent reader of the prompt comes to the same answer."""
    for item in rows(task, "test", 3, COUNT):
        assert SOLVERS[task](item) == item.answer, item


def test_tasks_and_readers_are_the_same_list() -> None:
    assert set(SOLVERS) == set(TASKS) == set(tasks.TASKS)


def test_unknown_rows_ask_for_what_is_not_there() -> None:
    assert all(
        item.answer.endswith(": Not in the facts.") for item in rows("unknown", "test", 0, COUNT)
    )
