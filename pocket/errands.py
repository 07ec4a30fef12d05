"""Exchanges that need no sheet of facts: the request of a customer and the one right answer.

Each function draws the pair from the words of one split. Answers are canonical, so that a
comparison of whole strings is fair.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocket.words import MONTHS, Draw, numbers_fit


@dataclass(frozen=True, slots=True)
class Exchange:
    user: str
    answer: str


# -- extract ----------------------------------------------------------------------------------

_OPENINGS = ("", "Hello. ", "Dear team, my parcel is late. ", "The lamp came broken. ")
_SENTENCES = {
    "name": "My name is {}.",
    "city": "My city is {}.",
    "order": "My order is {}.",
    "amount": "The amount is {} euros.",
}


def draw_extract(draw: Draw) -> Exchange:
    """Two to four fields of a letter as one line of JSON, in the order in which they were named."""
    values: dict[str, Any] = {
        "name": draw.name(),
        "city": draw.name(),
        "order": draw.order_code(),
        "amount": draw.number(5, 999),
    }
    fields = draw.rng.sample(list(values), draw.rng.randint(2, 4))
    told = draw.rng.sample(list(values), len(values))
    letter = " ".join(_SENTENCES[field].format(values[field]) for field in told)
    wish = draw.rng.choice(("Extract {} as JSON:", "Give me JSON with {}:", "Read {} into JSON:"))
    answer = json.dumps({field: values[field] for field in fields})
    text = draw.rng.choice(_OPENINGS) + letter
    return Exchange(f"{wish.format(', '.join(fields))} {text}", answer)


# -- classify ---------------------------------------------------------------------------------

INTENTS: dict[str, tuple[str, ...]] = {
    "refund": (
        "I want my money back for {order}",
        "please refund {order}",
        "when will I get back what I paid for {order}",
        "the refund of {order} is still missing",
        "pay me back the {good}",
    ),
    "delivery": (
        "where is my parcel {parcel}",
        "my order {order} has not come",
        "when does {order} arrive",
        "the carrier lost {parcel}",
        "I am still waiting for the {good}",
    ),
    "damage": (
        "the {good} came broken",
        "there is a crack in the {good}",
        "{order} was damaged in the box",
        "the {good} has a scratch",
        "my {good} does not work any more",
    ),
    "exchange": (
        "I would like to swap the {good} for another colour",
        "can I change the {good} for a bigger one",
        "please exchange {order}",
        "the {good} is too small, send a larger one",
        "I want a different {good} instead",
    ),
    "invoice": (
        "please send the bill for {order}",
        "I need an invoice for {order}",
        "the bill of {order} shows a wrong address",
        "where can I find the invoice of the {good}",
        "my bookkeeper asks for the bill of {order}",
    ),
    "cancel": (
        "please cancel {order}",
        "I do not want {order} any more, stop it",
        "I changed my mind, cancel the {good}",
        "stop my order {order}",
        "do not send the {good}, I cancel it",
    ),
    "stock": (
        "do you have the {good}",
        "is the {good} available",
        "when is the {good} in stock again",
        "how many of the {good} are left",
        "can I buy the {good} today",
    ),
    "account": (
        "I forgot my password",
        "I cannot log in as {name}",
        "please change my address to {name}",
        "how do I delete my account",
        "my login is {name} and it is locked",
    ),
}
_OPENERS = ("", "Hello, ", "Hi, ", "Good morning, ", "Dear team, ", "Excuse me, ")
_CLOSERS = ("", " Thank you.", " Regards, {name}", " Please hurry.", " This is {name}.")
_SORTING = (
    "Classify the message as one of {labels}: {message}",
    "Which of {labels} fits this message? {message}",
    "Sort this message. Labels: {labels}. Message: {message}",
)


def draw_classify(draw: Draw) -> Exchange:
    """One of the intents for a message; the labels stand in the request in random order."""
    intent = draw.rng.choice(list(INTENTS))
    core = draw.rng.choice(INTENTS[intent])
    pattern = draw.rng.choice(_OPENERS) + core + "." + draw.rng.choice(_CLOSERS)
    message = pattern.format(
        order=draw.order_code(), parcel=draw.parcel_code(), good=draw.good(), name=draw.name()
    )
    labels = ", ".join(draw.rng.sample(list(INTENTS), len(INTENTS)))
    request = draw.rng.choice(_SORTING).format(
        labels=labels, message=message[0].upper() + message[1:]
    )
    return Exchange(request, intent)


# -- total ------------------------------------------------------------------------------------


def add_up(first: int, second: int) -> str:
    """The work of one addition, tens and ones apart: a small model can learn each part."""
    tens, ones = first // 10 + second // 10, first % 10 + second % 10
    return f"= {tens} tens + {ones} = {first + second}"


def draw_total(draw: Draw) -> Exchange:
    """The sum of two or three prices, added up step by step; the steps are part of the answer."""
    count = draw.rng.choice((2, 3))
    while True:
        prices = [draw.number(2, 49) for _ in range(count)]
        steps, running = [], prices[0]
        for price in prices[1:]:
            steps.append(f"{running} + {price} {add_up(running, price)}")
            running += price
        answer = f"{', '.join(steps)}. Total: {running} euros"
        if numbers_fit(answer, draw.split):
            break
    goods = [draw.good() for _ in prices]
    bill = draw.rng.choice(("; ", ", ")).join(
        f"{good} {price} euros" for good, price in zip(goods, prices, strict=True)
    )
    request = draw.rng.choice(
        ("Add up this order: {}.", "What is the total of this order? {}.", "My basket: {}. Add up.")
    )
    return Exchange(request.format(bill), answer)


# -- rewrite ----------------------------------------------------------------------------------


def _draw_date(draw: Draw) -> tuple[str, str]:
    year, month, day = draw.number(1990, 2049), draw.rng.randint(1, 12), draw.rng.randint(1, 28)
    written = draw.rng.choice(
        (
            f"{day} {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1]} {day}, {year}",
            f"{day:02}.{month:02}.{year}",
            f"{day:02}/{month:02}/{year}",
        )
    )
    return written, f"{year}-{month:02}-{day:02}"


def _draw_amount(draw: Draw) -> tuple[str, str]:
    while True:
        euros, cents = draw.rng.randint(2, 9999), draw.rng.randint(1, 99)
        grouped = f"{euros:,}"
        written = draw.rng.choice(
            (
                f"{euros} euros and {cents} cents",
                f"{grouped}.{cents:02} euros",
                f"{grouped.replace(',', '.')},{cents:02} euros",
                f"{euros},{cents:02} EUR",
            )
        )
        short = f"EUR {euros}.{cents:02}"
        if numbers_fit(f"{written} {short}", draw.split):
            return written, short


def draw_rewrite(draw: Draw) -> Exchange:
    """A date as year-month-day, or an amount with its currency first and a point for the cents."""
    if draw.rng.random() < 0.5:
        written, short = _draw_date(draw)
        wish = ("Write the date {} in the short form.", "Rewrite as year-month-day: {}.")
    else:
        written, short = _draw_amount(draw)
        wish = ("Write the amount {} in the short form.", "Rewrite as EUR amount: {}.")
    return Exchange(draw.rng.choice(wish).format(written), short)


# -- repeat -----------------------------------------------------------------------------------

_CODE_KINDS: dict[str, Callable[[Draw], str]] = {
    "order": Draw.order_code,
    "parcel": Draw.parcel_code,
    "ticket": Draw.ticket_code,
    "shelf": Draw.shelf_code,
}


def draw_repeat(draw: Draw) -> Exchange:
    """One of up to three codes in a note, repeated exactly."""
    kinds = draw.rng.sample(list(_CODE_KINDS), draw.rng.randint(1, 3))
    codes = {kind: _CODE_KINDS[kind](draw) for kind in kinds}
    wanted = draw.rng.choice(kinds)
    note = draw.rng.choice((", ", " and ")).join(f"the {kind} is {codes[kind]}" for kind in kinds)
    request = draw.rng.choice(
        (
            "Repeat the {wanted} code exactly: {note}.",
            "I wrote down that {note}. Repeat the {wanted} code exactly.",
            "My note says that {note}. Please confirm the {wanted} code.",
        )
    )
    return Exchange(request.format(wanted=wanted, note=note), f"The {wanted} is {codes[wanted]}.")


# -- remember ---------------------------------------------------------------------------------


def draw_remember(draw: Draw) -> list[Exchange]:
    """A greeting that names things, and a later question for each of them."""
    name, city, order = draw.name(), draw.name(), draw.order_code()
    told = [f"my name is {name}", f"my city is {city}", f"my order is {order}"]
    draw.rng.shuffle(told)
    hello = draw.rng.choice(("Hello", "Good morning", "Hi"))
    greeting = f"{hello}, {told[0]}, {told[1]} and {told[2]}."
    later = [
        Exchange(draw.rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}."),
        Exchange(
            draw.rng.choice(("Which city am I from?", "Where do I live?")), f"Your city is {city}."
        ),
        Exchange(
            draw.rng.choice(("Which order did I write about?", "What is my order?")),
            f"Your order is {order}.",
        ),
    ]
    draw.rng.shuffle(later)
    return [Exchange(greeting, f"Hello {name}, how can I help?"), *later]
