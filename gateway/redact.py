"""Blots out what names a person or opens a door. Pure.

A replacement says what stood there (`[email]`), the same for the same, so that equal prompts stay
equal. Finds forms, not meanings: a name in a sentence stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

DIGITS = tuple("0123456789")


@dataclass(frozen=True, slots=True)
class Form:
    """What something looks like, and what stands there then. A text is searched only if it has one
    of the `words` (in small letters) and matches the `hint`, which are quicker than the form."""

    text: str
    instead: str
    words: tuple[str, ...]
    hint: str = ""


FORMS: dict[str, tuple[Form, ...]] = {
    "key": (
        Form(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----",
            "[key]",
            ("-----begin",),
        ),
        Form(
            r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}",
            "[key]",
            ("sk-", "sk_", "pk-", "pk_", "rk-", "rk_"),
        ),
        Form(
            r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bxox[abprs]-[\w-]{10,}",
            "[key]",
            ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "xox"),
        ),
        Form(
            r"\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",
            "[key]",
            ("akia", "aiza", "eyj"),
        ),
        Form(r"(?i:\bbearer) [A-Za-z0-9._~+/-]{16,}=*", "[key]", ("bearer ",)),
        Form(  # the word stays, so that JSON in a text stays JSON
            r"(\b(?i:api[_-]?key|secret|passw(?:or)?d|token)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"[^\s\"',;}\[]{4,}",
            r"\1[key]",
            ("api", "secret", "passw", "token"),
        ),
    ),
    "email": (Form(r"\b[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}\b", "[email]", ("@",)),),
    "iban": (
        Form(
            r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
            "[iban]",
            DIGITS,
            r"[A-Z][A-Z]\d\d",
        ),
    ),
    "card": (  # if its last digit is the check of the others
        Form(r"\b\d(?:[ -]?\d){12,18}\b", "[card]", DIGITS, r"\d(?:[ -]?\d){12}"),
    ),
    "ip": (
        Form(
            r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)"
            r"(?!\.?\d)",
            "[ip]",
            DIGITS,
            r"\d\.\d{1,3}\.\d{1,3}\.\d",
        ),
        Form(
            r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){3,7}(?::?[0-9A-Fa-f]{1,4}){1,5}(?![\w:])",
            "[ip]",
            (":",),
            r":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:",
        ),
    ),
    "phone": (
        Form(r"(?<![\w+])\+\d[\d ()./-]{7,17}\d\b", "[phone]", ("+",)),
        Form(
            r"(?<!\w)\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",
            "[phone]",
            DIGITS,
            r"\d\d\d[ .-]\d{4}",
        ),
    ),
}

Blot = Callable[[str], str]


def blotter(names: Iterable[str], own: Iterable[str] = ()) -> Blot:
    """Blots the named forms out of a text, and then what one's own expressions match."""
    wanted = set(names)
    forms = [
        (
            form,
            re.compile(form.text),
            re.compile(form.hint),
            _card if name == "card" else form.instead,
        )
        for name, those in FORMS.items()
        if name in wanted
        for form in those
    ]
    more = [re.compile(text) for text in own]

    def blot(text: str) -> str:
        small = text.lower()
        for form, pattern, hint, instead in forms:
            if any(word in small for word in form.words) and hint.search(text):
                text = pattern.sub(instead, text)
        for pattern in more:
            text = pattern.sub("[redacted]", text)
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
