"""Sheets of facts about customers, goods and orders, and questions about them.

A fact is (entity, attribute, value); a sheet is a list of facts in which a pair of entity and
attribute occurs at most once, so that every question has one answer or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pocket.words import COLOURS, PLANS, STATUSES, Draw

ABSENT = "Not in the facts"

_QUESTIONS = (
    "What is the {attribute} of {entity}?",
    "Which {attribute} does {entity} have?",
    "Please tell me the {attribute} of {entity}.",
    "{entity}: what is the {attribute}?",
    "I need the {attribute} of {entity}.",
)
_SAME_ENTITY = ("And the {attribute}?", "What about the {attribute}?", "And which {attribute}?")
_SAME_ATTRIBUTE = ("And of {entity}?", "What about {entity}?", "And for {entity}?")


def _euros(draw: Draw) -> str:
    return f"{draw.number(5, 999)} euros"


_KINDS: dict[str, tuple[Callable[[Draw], str], dict[str, Callable[[Draw], str]]]] = {
    "customer": (
        Draw.name,
        {
            "city": Draw.name,
            "agent": Draw.name,
            "order": Draw.order_code,
            "plan": lambda draw: draw.rng.choice(PLANS).capitalize(),
            "balance": _euros,
        },
    ),
    "good": (
        Draw.good,
        {
            "price": _euros,
            "colour": lambda draw: draw.rng.choice(COLOURS).capitalize(),
            "shelf": Draw.shelf_code,
            "stock": lambda draw: f"{draw.number(2, 99)} pieces",
            "maker": Draw.name,
        },
    ),
    "order": (
        lambda draw: f"order {draw.order_code()}",
        {
            "status": lambda draw: draw.rng.choice(STATUSES).capitalize(),
            "carrier": Draw.name,
            "parcel": Draw.parcel_code,
            "total": _euros,
            "day": Draw.day,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Fact:
    kind: str
    entity: str
    attribute: str
    value: str


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def draw_sheet(draw: Draw, fact_count: int) -> list[Fact]:
    """`fact_count` facts in random order, about two to four of them for each entity."""
    kinds = list(_KINDS) if draw.rng.random() < 0.4 else [draw.rng.choice(list(_KINDS))]
    facts: list[Fact] = []
    while len(facts) < fact_count:
        kind = draw.rng.choice(kinds)
        draw_entity, attributes = _KINDS[kind]
        entity = draw_entity(draw)
        if any(fact.entity == entity for fact in facts):
            continue
        share = min(draw.rng.randint(2, 4), fact_count - len(facts))
        facts += [
            Fact(kind, entity, attribute, attributes[attribute](draw))
            for attribute in draw.rng.sample(list(attributes), share)
        ]
    if draw.rng.random() < 0.5:
        draw.rng.shuffle(facts)
    return facts


def state(facts: list[Fact]) -> str:
    """The sheet as text, one fact a line."""
    lines = (f"{_capital(fact.entity)} {fact.attribute}: {fact.value}." for fact in facts)
    return "Facts:\n" + "\n".join(lines)


def ask(draw: Draw, entity: str, attribute: str) -> str:
    return _capital(draw.rng.choice(_QUESTIONS).format(entity=entity, attribute=attribute))


def tell(facts: list[Fact], entity: str, attribute: str) -> str:
    """The answer to a question: its record, with the value or saying that there is none."""
    values = (f.value for f in facts if f.entity == entity and f.attribute == attribute)
    return f"{_capital(entity)} {attribute}: {next(values, ABSENT)}."


def draw_missing(draw: Draw, facts: list[Fact]) -> tuple[str, str]:
    """An entity and an attribute that the sheet does not join."""
    known = draw.rng.choice(facts)
    draw_entity, attributes = _KINDS[known.kind]
    given = {fact.attribute for fact in facts if fact.entity == known.entity}
    absent = [attribute for attribute in attributes if attribute not in given]
    if draw.rng.random() < 0.5 and absent:
        return known.entity, draw.rng.choice(absent)
    return draw_entity(draw), known.attribute


def follow_up(draw: Draw, facts: list[Fact], last: Fact) -> tuple[str, Fact] | None:
    """A question that is understood only after one about `last`, and the fact it asks for."""
    same_entity = [f for f in facts if f.entity == last.entity and f != last]
    same_attribute = [f for f in facts if f.attribute == last.attribute and f != last]
    if same_entity and (not same_attribute or draw.rng.random() < 0.5):
        fact = draw.rng.choice(same_entity)
        return draw.rng.choice(_SAME_ENTITY).format(attribute=fact.attribute), fact
    if same_attribute:
        fact = draw.rng.choice(same_attribute)
        return draw.rng.choice(_SAME_ATTRIBUTE).format(entity=fact.entity), fact
    return None
