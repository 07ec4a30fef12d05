"""What can be tried on a policy: techniques by name, knobs by path, hypotheses by file, and sums.

Knows patches and what they can do to answers; measures nothing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.knobs import KNOBS, Kind, allowed, knob_of
from policies.load import load_hypothesis
from policies.problems import closest

_EVERY_TIER = ["interactive", "standard", "relaxed", "batch"]
# Name -> the knobs that it sets, and what it does.
NAMED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "w8a8": ({"runtime.weights": "w8a8"}, "weights and activations in 8 bits"),
    "w8": ({"runtime.weights": "w8"}, "weights in 8 bits"),
    "int4": ({"runtime.weights": "int4"}, "weights in 4 bits"),
    "bf16": ({"runtime.weights": "bf16"}, "weights in bf16"),
    "int8-kv": ({"runtime.kv": "int8"}, "keys and values in 8 bits"),
    "ngram": ({"runtime.speculation": "ngram"}, "tokens guessed from what was said before"),
    "tree": ({"runtime.speculation": "tree"}, "several guesses at once"),
    "draft": (
        {"runtime.speculation": {"proposer": "draft", "draft": "pocket"}},
        "tokens guessed by pocket's small model",
    ),
    "no-speculation": ({"runtime.speculation": "off"}, "nothing guessed"),
    "chunked-prefill": (
        {"runtime.tpot_ms": 10.0},
        "prompts computed in pieces, small enough that running answers go on",
    ),
    "whole-prefill": ({"runtime.tpot_ms": None}, "prompts computed whole"),
    "compiled": ({"runtime.compile": "auto"}, "kernels compiled for this machine"),
    "trim": ({"gateway.trim": {"drop": "middle"}}, "long conversations cut in batches"),
    "sliding-trim": (
        {"gateway.trim": {"drop": "oldest", "keep_share": 1.0}},
        "long conversations cut in every turn",
    ),
    "response-cache": (
        {"gateway.response_cache": {"tiers": _EVERY_TIER}},
        "answers given again to the same request",
    ),
    "two-workers": ({"runtime.workers": 2}, "two copies of the model"),
}
# Kind of change, the mildest first -> how much there is to understand and to keep right.
_WEIGHTS: Mapping[Kind, int] = {
    "routing_only": 1, "lossless_exact": 1, "lossless_distribution": 2, "lossy_model": 2,
    "lossy_input": 3,
}  # fmt: skip
_NAME = re.compile(r"[^a-z0-9._-]+")


class NoTechnique(ValueError):
    """What was asked for cannot be tried; says why and what can."""


@dataclass(frozen=True, slots=True)
class Technique:
    """One row of a menu. `parts` are the names that it adds up from."""

    name: str
    patch: Mapping[str, Any]
    said: str
    parts: tuple[str, ...]

    @property
    def knobs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(knob_of(path)) for path in self.patch))

    @property
    def kind(self) -> Kind:
        """The mildest kind of change that may touch all of its knobs."""
        return next(kind for kind in _WEIGHTS if all(allowed(kind, knob) for knob in self.knobs))

    @property
    def complexity(self) -> int:
        """1 to 5: what its worst knob can do to answers, one more for each further knob, one for
        a second model that has to be kept fitting."""
        worst = max(_WEIGHTS[KNOBS[knob]] for knob in self.knobs)
        second = any(_has(value, "draft") for value in self.patch.values())
        return min(worst + len(self.knobs) - 1 + second, 5)

    @property
    def file_name(self) -> str:
        """As hypotheses may be named."""
        return _NAME.sub("-", f"menu-{self.name.replace('+', '-')}".lower())[:64].rstrip("-")


def technique(asked: str, beside: Path) -> Technique:
    """`w8a8`, `runtime.kv=int8`, `mine.yaml`, or a sum of these: `w8a8+ngram`.

    Files are looked for beside the policy, too. Raises NoTechnique, PolicyError.
    """
    return combined([_single(part.strip(), beside) for part in asked.split("+")])


def combined(parts: Sequence[Technique]) -> Technique:
    """All of them at once. Raises NoTechnique where they cannot be."""
    patch: dict[str, Any] = {}
    for part in parts:
        for path, value in part.patch.items():
            if path in patch and patch[path] != value:
                names = " and ".join(one.name for one in parts)
                raise NoTechnique(f"{names} both set {path}: they cannot be tried together")
            patch[path] = value
    whole = Technique(
        "+".join(part.name for part in parts), patch,
        "; ".join(part.said for part in parts if part.said),
        tuple(name for part in parts for name in part.parts),
    )  # fmt: skip
    if not any(all(allowed(kind, knob) for knob in whole.knobs) for kind in _WEIGHTS):
        raise NoTechnique(
            f"{whole.name}: no kind of change covers {', '.join(whole.knobs)}; adopt one, and try "
            "the other on the policy that has it"
        )
    return whole


def combinations(parts: Sequence[Technique]) -> Iterable[Technique]:
    """Every sum of two or more that can be, the small ones first."""
    for size in range(2, len(parts) + 1):
        for chosen in itertools.combinations(parts, size):
            try:
                yield combined(chosen)
            except NoTechnique:
                continue


def _single(asked: str, beside: Path) -> Technique:
    if asked in NAMED:
        patch, said = NAMED[asked]
        return Technique(asked, patch, said, (asked,))
    if asked.endswith((".yaml", ".yml")):
        return _of_file(asked, beside)
    path, equals, value = asked.partition("=")
    if equals:
        if knob_of(path) is None:
            near = closest(path, list(KNOBS))
            raise NoTechnique(f"{path} is no knob" + (f"; did you mean {near!r}?" if near else ""))
        return Technique(asked, {path: _value(value)}, "", (asked,))
    near = closest(asked, list(NAMED))
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(NAMED)}."
    raise NoTechnique(
        f"no technique {asked!r}; {hint} A hypothesis file, or knob=value such as runtime.kv=int8, "
        "will do too"
    )


def _of_file(asked: str, beside: Path) -> Technique:
    file = Path(asked) if Path(asked).exists() else beside / asked
    given = load_hypothesis(file)
    if not given.candidate.patch:
        raise NoTechnique(f"{file}: its candidate has no patch to try on another policy")
    return Technique(given.name, given.candidate.patch, given.metadata.note, (given.name,))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _has(value: Any, name: str) -> bool:
    return isinstance(value, dict) and bool(value.get(name))
