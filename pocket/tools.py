"""The tools that rows may offer, and requests that call one of them.

Tools are written as OpenAI function tools; a call is written in the answer as one line of JSON
between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pocket.errands import Exchange
from pocket.words import Draw

_ARGUMENTS: dict[str, Callable[[Draw], Any]] = {
    "order": Draw.order_code,
    "parcel": Draw.parcel_code,
    "shelf": Draw.shelf_code,
    "city": Draw.name,
    "customer": Draw.name,
    "product": Draw.good,
    "amount": lambda draw: draw.number(5, 999),
    "day": Draw.day,
}

# name: (what it does, its arguments, ways to ask for it)
CATALOGUE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "order_status": (
        "Look up an order",
        ("order",),
        ("Where is order {order}?", "Check order {order}.", "How far is {order}?"),
    ),
    "track_parcel": (
        "Track a parcel",
        ("parcel",),
        ("Track parcel {parcel}.", "Where is parcel {parcel} now?"),
    ),
    "refund": (
        "Pay money back",
        ("order", "amount"),
        (
            "Refund {amount} euros for order {order}.",
            "Order {order} was broken, pay back {amount} euros.",
        ),
    ),
    "cancel_order": (
        "Cancel an order",
        ("order",),
        ("Cancel order {order}.", "Please stop {order}, I cancel it."),
    ),
    "find_customer": (
        "Find a customer",
        ("customer", "city"),
        ("Find the customer {customer} from {city}.", "Do we know {customer} in {city}?"),
    ),
    "check_stock": (
        "Count the stock of a product",
        ("product",),
        ("How many {product} are left?", "Is the {product} in stock?"),
    ),
    "book_pickup": (
        "Book a pickup",
        ("city", "day"),
        ("Book a pickup in {city} on {day}.", "Send the van to {city} on {day}."),
    ),
    "read_shelf": (
        "List what is on a shelf",
        ("shelf",),
        ("What is on shelf {shelf}?", "List the goods on shelf {shelf}."),
    ),
}


def describe(name: str) -> dict[str, Any]:
    """The tool as an OpenAI function tool."""
    purpose, arguments, _ = CATALOGUE[name]
    properties = {
        argument: {"type": "integer" if argument == "amount" else "string"}
        for argument in arguments
    }
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": purpose,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(arguments),
            },
        },
    }


def draw_tool_names(draw: Draw) -> list[str]:
    return draw.rng.sample(list(CATALOGUE), draw.rng.randint(2, 4))


def draw_tool_call(draw: Draw, names: list[str]) -> Exchange:
    """A request that one of the offered tools serves, and the call that serves it."""
    name = draw.rng.choice(names)
    _, arguments, requests = CATALOGUE[name]
    values = {argument: _ARGUMENTS[argument](draw) for argument in arguments}
    call = json.dumps({"name": name, "arguments": values})
    return Exchange(draw.rng.choice(requests).format(**values), f"<tool_call>{call}</tool_call>")
