"""What a command reads from a person, and tells while it works, on stderr: lines that stay, and one
that moves.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import click


def log(line: str) -> None:
    click.echo(line, err=True)


def show(line: str) -> None:
    """One line that replaces the last, where somebody watches."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r\x1b[K{line[:width]}", nl=False, err=True)


class Share(click.ParamType[float]):
    """A share as policies have it: 0.03 or 3%."""

    name = "share"

    def __init__(self, *, above: float = -1.0) -> None:
        self._above = above

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1 or share <= self._above:
            self.fail(f"expected a share such as 0.03 or 3%, got {text!r}", param, ctx)
        return share
