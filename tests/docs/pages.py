"""What a page of the documentation asks its reader to type, and what it shows of the answer.

Knows fenced blocks: `console` (lines after `$ `, each with what it prints below), `bash` or `sh` (a
script), `text seen` (what the script before it printed), and any block whose second word names a
file, which the reader saves. `parse` behind the language: it needs what a test has not, a GPU, a
cluster, another engine; `exit=N`: its last command ends so; `exit=0|4`: so or so, as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SCRIPT = ("bash", "sh")
_CHANGING = re.compile(r"[0-9a-f]{8,}|\d+(?:[.,:]\d+)*")

_BAR = re.compile("[\u2588-\u2590][\u2588-\u2590·]*")  # command/trace.py draws these


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a reader does: runs `command`, or saves `command` as `file`."""

    place: str  # page:line
    command: str
    shown: tuple[str, ...] = ()
    file: str | None = None
    runs: bool = True  # else its words are only checked
    codes: tuple[int, ...] = (0,)


def steps(page: Path) -> Iterator[Step]:
    text = page.read_text(encoding="utf-8")
    waiting: Step | None = None
    for found in _FENCE.finditer(text):
        language, words, body = found[1], found[2].split(), found[3]
        place = f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}"
        if language == "text" and words == ["seen"]:
            assert waiting is not None, f"{place}  nothing was typed before it"
            yield replace(waiting, shown=tuple(body.splitlines()))
            waiting = None
            continue
        if waiting is not None:
            yield waiting
        waiting = None
        made = _made(place, language, words, body)
        if language in _SCRIPT and made[0].file is None:
            (waiting,) = made
        else:
            yield from made
    if waiting is not None:
        yield waiting


def _made(place: str, language: str, words: list[str], body: str) -> list[Step]:
    files = [word for word in words if "." in word]
    if files:
        return [Step(place, body, file=files[0])]
    ends = [word.removeprefix("exit=") for word in words if word.startswith("exit=")]
    unknown = [word for word in words if word != "parse" and not word.startswith("exit=")]
    assert not unknown or language not in (*_SCRIPT, "console"), f"{place}  unknown words {unknown}"
    runs, codes = "parse" not in words, tuple(map(int, "|".join(ends or ["0"]).split("|")))
    if language in _SCRIPT:
        return [Step(place, body, runs=runs, codes=codes)]
    if language != "console":
        return []
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert not parts[0].strip(), f"{place}  a console block begins with `$ `"
    made = []
    for part in parts[1:]:
        lines = part.rstrip("\n").split("\n")
        typed = next(at for at, line in enumerate(lines) if not line.endswith("\\")) + 1
        made.append(
            Step(place, "\n".join(lines[:typed]), tuple(filter(None, lines[typed:])), runs=runs)
        )
    return [*made[:-1], replace(made[-1], codes=codes)] if made else []


def missing(step: Step, printed: str) -> list[str]:
    """Lines that the page shows and nobody printed. Numbers, hashes, blanks and the lengths of bars
    may differ; `...` stands for anything."""
    lines = [_shape(line) for line in printed.splitlines()]
    return [
        line
        for line in step.shown
        if not any(re.fullmatch(_pattern(_shape(line)), one) for one in lines)
        and line.strip() != "..."
    ]


def _shape(line: str) -> str:
    return re.sub(r"\s+", " ", _BAR.sub("█", _CHANGING.sub("#", line))).strip()


def _pattern(shape: str) -> str:
    return ".*".join(map(re.escape, shape.split("...")))
