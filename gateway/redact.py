"""Blots out what names a person or opens a door. Pure.

A replacement says what stood there (`[email]`), the same for the same, so that equal prompts stay
equal. Finds forms, not meanings: a name in a sentence stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# name -> what it looks like, and what stands there then
PATTERNS: dict[str, tuple[tuple[str, str], ...]] = {
    "key": (
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----"
            r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}"
            r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bxox[abprs]-[\w-]{10,}"
            r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}"
            r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
            r"|(?i:\bbearer) [A-Za-z0-9._~+/-]{16,}=*",
            "[key]",
        ),
        (  # the word stays, so that JSON in a text stays JSON
            r"(\b(?i:api[_-]?key|secret|passw(?:or)?d|token)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"[^\s\"',;}\[]{4,}",
            r"\1[key]",
        ),
    ),
    "email": ((r"\b[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}\b", "[email]"),),
    "iban": ((r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", "[iban]"),),
    "card": ((r"\b\d(?:[ -]?\d){12,18}\b", "[card]"),),  # if its digits are those of one
    "ip": (
        (
            r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)"
            r"(?!\.?\d)"
            r"|(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){3,7}(?::?[0-9A-Fa-f]{1,4}){1,5}(?![\w:])",
            "[ip]",
        ),
    ),
    "phone": (
        (
            r"(?<![\w+])\+\d[\d ()./-]{7,17}\d\b|(?<!\w)\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",
            "[phone]",
        ),
    ),
}

Blot = Callable[[str], str]


def blotter(names: Iterable[str], own: Iterable[str] = ()) -> Blot:
    """Blots the named patterns out of a text, and then what one's own ones match."""
    wanted = set(names)
    rules: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
        (re.compile(text), _card if name == "card" else instead)
        for name, entries in PATTERNS.items()
        if name in wanted
        for text, instead in entries
    ]
    rules += [(re.compile(text), "[redacted]") for text in own]

    def blot(text: str) -> str:
        for pattern, instead in rules:
            text = pattern.sub(instead, text)
        return text

    return blot


def _card(found: re.Match[str]) -> str:
    """Only numbers whose last digit is the check of the others (ISO/IEC 7812-1, Luhn)."""
    digits = [int(one) for one in found[0] if one.isdigit()]
    doubled = [sum(divmod(2 * one, 10)) for one in digits[-2::-2]]
    is_card = (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
    return "[card]" if is_card else found[0]


def blotted(value: Any, blot: Blot) -> Any:
    """The same JSON with every text in it blotted; names of fields stay."""
    if isinstance(value, str):
        return blot(value)
    if isinstance(value, list):
        return [blotted(one, blot) for one in value]
    if isinstance(value, dict):
        return {name: blotted(one, blot) for name, one in value.items()}
    return value
