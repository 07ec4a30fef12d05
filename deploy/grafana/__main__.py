"""`python -m deploy.grafana`: writes the dashboards that Grafana is provisioned with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from deploy.grafana.boards import BOARDS

FOLDER = Path(__file__).parent / "dashboards"


def files() -> Iterator[tuple[Path, str]]:
    """Each dashboard's file and text."""
    for board in BOARDS:
        name = f"{board.uid.removeprefix('headgate-')}.json"
        yield FOLDER / name, json.dumps(board.json(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file, text in files():
        file.write_text(text, encoding="utf-8")
