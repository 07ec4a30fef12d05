"""The words that rows are made of, and which of them belong to the test split.

A name, a code or a number belongs to the test split when a stable hash says so; everything else
is for training. Numbers up to 31 (days, months, small counts) are shared by both splits, and so
is the fixed vocabulary below (months, colours, goods). This module knows nothing of tasks.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache

SPLITS = ("train", "test")
LARGEST_SHARED_NUMBER = 31

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow", "silver", "pink")
GOODS = (
    "lamp",
    "chair",
    "desk",
    "kettle",
    "clock",
    "mirror",
    "shelf",
    "carpet",
    "basket",
    "pillow",
    "radio",
    "camera",
    "jacket",
    "bicycle",
    "printer",
    "teapot",
)
STATUSES = ("open", "paid", "packed", "shipped", "delivered", "returned", "cancelled", "on hold")
PLANS = ("basic", "plus", "silver", "gold", "family", "business")

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "l", "n", "r", "s")
SYLLABLES = tuple(o + v + c for o in _ONSETS for v in _VOWELS for c in _CODAS)
# Words of the requests that could be taken for made-up names.
NEVER_NAMES = frozenset(
    [
        "Damage",
        "Date",
        "Give",
        "Hello",
        "Here",
        "Home",
        "Live",
        "Maker",
        "Message",
        "Mirror",
        "Name",
        "Note",
        "Silver",
        "Total",
    ]
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_DIGIT_RUN = re.compile(r"\d+")


@lru_cache(maxsize=200_000)
def held_out(item: str) -> bool:
    """Whether a name or the digits of a number belong to the test split (one in four does)."""
    return hashlib.sha256(item.encode()).digest()[0] % 4 == 0


def numbers_fit(text: str, split: str) -> bool:
    """Whether every number in `text` above the shared ones belongs to `split`."""
    wanted = split == "test"
    return all(
        held_out(digits.lstrip("0")) == wanted
        for digits in _DIGIT_RUN.findall(text)
        if int(digits) > LARGEST_SHARED_NUMBER
    )


class Draw:
    """Random names, codes and numbers of one split. `names` keeps the names that were drawn."""

    def __init__(self, rng: random.Random, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        self.rng = rng
        self.split = split
        self.names: set[str] = set()

    def name(self) -> str:
        """A made-up proper name of two or three syllables, new to this draw."""
        while True:
            count = 2 if self.rng.random() < 0.7 else 3
            name = "".join(self.rng.choice(SYLLABLES) for _ in range(count)).capitalize()
            if name in self.names or name in NEVER_NAMES:
                continue
            if held_out(name) == (self.split == "test"):
                self.names.add(name)
                return name

    def number(self, low: int, high: int) -> int:
        """A number of this split between `low` and `high`, both included."""
        while True:
            number = self.rng.randint(low, high)
            if numbers_fit(str(number), self.split):
                return number

    def letters(self, count: int) -> str:
        return "".join(self.rng.choice(_LETTERS) for _ in range(count))

    def order_code(self) -> str:
        return f"{self.letters(2)}-{self.number(1000, 9999)}"

    def parcel_code(self) -> str:
        return f"{self.number(1000, 9999)}-{self.number(1000, 9999)}"

    def ticket_code(self) -> str:
        return f"{self.letters(3)}{self.number(100, 999)}{self.letters(1)}"

    def shelf_code(self) -> str:
        return f"{self.letters(1)}-{self.number(10, 99)}"

    def code(self) -> str:
        kinds = (self.order_code, self.parcel_code, self.ticket_code, self.shelf_code)
        return self.rng.choice(kinds)()

    def good(self) -> str:
        """A product: a made-up brand and a kind of thing."""
        return f"{self.name()} {self.rng.choice(GOODS)}"

    def day(self) -> str:
        return f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS)}"
