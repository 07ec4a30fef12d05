"""The policy that an arm is started by: the same configuration, in a place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from evals.arm_policy import placed, write_policy
from policies.load import load
from policies.patching import Configured
from policies.schema import Deployment
from policies.yaml_tree import parse

WHOLE = """\
version: 1
gateway:
  port: 9000
  store: {redis: "redis://cache:6379"}
  trim: {drop: oldest, budget_tokens: 512}
runtime:
  model: tiny
  adapters: loras
  speculation: {proposer: draft, draft: draft}
  kv_events: {topic: kv}
  tiers: {disk: {path: kv, max_bytes: 1 GiB}}
upstreams: [{url: "http://127.0.0.1:8000", tokenizer: tiny}]
discovery: [{file: replicas.yaml}]
"""


def test_paths_are_absolute_and_nothing_is_shared(tmp_path: Path) -> None:
    """Two arms side by side meet at no port, in no folder, and in no store."""
    for name in ("tiny", "loras", "draft"):
        (tmp_path / name).mkdir()
    data, _, _ = parse("x", WHOLE)
    first, second = (placed(data, tmp_path, tmp_path / arm) for arm in ("a", "b"))
    runtime = first["runtime"]
    assert runtime["model"] == str(tmp_path / "tiny")
    assert runtime["adapters"] == str(tmp_path / "loras")
    assert runtime["speculation"]["draft"] == str(tmp_path / "draft")
    assert first["upstreams"][0]["tokenizer"] == str(tmp_path / "tiny")
    assert first["discovery"][0]["file"] == str(tmp_path / "replicas.yaml")
    assert runtime["tiers"]["disk"]["path"] != second["runtime"]["tiers"]["disk"]["path"]
    assert runtime["kv_events"]["endpoint"].endswith(":0")
    assert "store" not in first["gateway"]
    assert (first["gateway"]["port"], first["gateway"]["reload"]) == (0, "signal")
    assert first["gateway"]["trim"] == {"drop": "oldest", "budget_tokens": 512}
    assert data["gateway"]["port"] == 9000
    Deployment.model_validate(first)


@pytest.mark.parametrize("model", ["pocket", "owner/name"])
def test_a_model_that_is_no_folder_keeps_its_name(tmp_path: Path, model: str) -> None:
    data = {"version": 1, "runtime": {"model": model}}
    assert placed(data, tmp_path, tmp_path / "a")["runtime"] == {"model": model}


def test_the_file_is_one_that_serve_takes(tmp_path: Path) -> None:
    """As it is written, with text of any language in it."""
    data = {"version": 1, "runtime": {"model": "pocket", "served_name": "größer ✓"}}
    configured = Configured(tmp_path / "base.yaml", data, Deployment.model_validate(data))
    file = write_policy(configured, tmp_path / "arm")
    read = load(file).runtime
    assert read is not None
    assert read.served_name == "größer ✓"
    with pytest.raises(ValidationError):
        Deployment.model_validate({**data, "port": 1})
