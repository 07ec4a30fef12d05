"""Who judges in the stack: another user beside the runtimes, and what the page says to judge."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.keys import NAMES

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())[
    "services"
]
SECTION = (ROOT / "docs" / "stack.md").read_text().split("\n## Bring a verdict\n")[1]
WRITTEN = {
    file: text
    for text in re.findall(r"```yaml parse\n(.*?)```", SECTION.split("\n## ")[0], re.DOTALL)
    for file in re.findall(r"^# mine/(\S+)$", text, re.MULTILINE)
}


def test_who_judges_is_in_the_group_that_the_images_share_sockets_with() -> None:
    """It runs as whoever owns the ledger. Without the group its gateways heard no block events:
    they routed by guesses, where those that serve know."""
    recipe = (ROOT / "Dockerfile").read_text()
    found = re.search(r"install -d -o \d+ -g (\d+) -m (\d+) /run/headgate", recipe)
    assert found is not None
    mode = int(found[2], base=8)
    assert mode & stat.S_ISGID
    assert mode & stat.S_IRWXG == stat.S_IRWXG
    assert not mode & stat.S_IRWXO
    assert found[1] in SERVICES["judge"]["group_add"]
    for name in ("gateway-0", "runtime-0"):
        assert SERVICES[name]["user"].endswith(f":{found[1]}")
        assert "kv-events:/run/headgate" in SERVICES[name]["volumes"]
    assert "kv-events:/run/headgate" in SERVICES["judge"]["volumes"]


def test_the_page_brings_a_verdict_on_runtimes_and_one_on_gateways() -> None:
    assert set(WRITTEN) == {"hypotheses/ngram.yaml", "hypotheses/trim.yaml"}


@pytest.mark.parametrize("file", WRITTEN)
def test_what_the_page_says_to_judge_can_be_shown(tmp_path: Path, file: str) -> None:
    """In folders as the container has them, beside copies of the stack's policies."""
    for name in ("runtime.yaml", "stack.yaml"):
        shutil.copy(ROOT / "deploy" / "stack" / name, tmp_path)
    (tmp_path / "model").symlink_to(ROOT / "pocket" / "target")
    (tmp_path / "hypotheses").mkdir()
    (tmp_path / file).write_text(WRITTEN[file])
    keys = {name: f"hg-test-of-a-plan-{at}" for at, name in enumerate(NAMES)}
    done = subprocess.run(
        [sys.executable, "-m", "headgate", "gate", "plan", file],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)} | keys,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "claim 1" in done.stdout
