"""`headgate gate schema`, as people type it."""

from __future__ import annotations

import json

import click


@click.command()
def schema() -> None:
    """Print the JSON Schema of hypothesis files, for editors and for those who write them.

    \b
    Example:
      headgate gate schema > hypothesis.schema.json

    \b
    Exit codes:
      0  printed
    """
    from policies.hypothesis import Hypothesis

    click.echo(json.dumps(Hypothesis.model_json_schema(), indent=2))
