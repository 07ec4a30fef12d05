"""What a command tells a person while it works, on stderr: lines that stay, and one that moves."""

from __future__ import annotations

import shutil
import sys

import click


def log(line: str) -> None:
    click.echo(line, err=True)


def show(line: str) -> None:
    """One line that replaces the last, where somebody watches."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r\x1b[K{line[:width]}", nl=False, err=True)
