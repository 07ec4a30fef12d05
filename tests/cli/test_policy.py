"""`headgate policy check | show`, as a person types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from command.policy import scalar, show_file
from policies.load import load
from policies.problems import every_field
from policies.schema import Deployment
from policies.yaml_tree import parse

ROOT = Path(__file__).parents[2]
WHOLE = """\
version: 1
gateway:
  port: 9000
  hedge: {after_s: 0.2}
  store: {redis: "redis://cache:6379"}
  tiers: {gold: {ttft_ms: 250, priority: 0}, batch: {queue_max: 10}}
  tenants:
    acme:
      keys: [8254c329a92850f6d539dd376f4816ee2764517da5e0235514af433164480d7a]
      tiers: [gold]
  trim:
    passages: {keep: 3}
    tiers: {batch: {drop: oldest}, gold: {drop: middle, keep_share: 0.25}}
  response_cache: {tiers: [standard, gold]}
  record: {consent: asked}
runtime:
  model: ../tiny
  served_name: "tiny: 1"
  threads: 3
  kv_events: {topic: kv}
  tiers: {host_bytes: 2 GiB, disk: {path: kv, max_bytes: 20 GiB}}
upstreams:
- url: http://127.0.0.1:8000
  api_key_env: KEY
  tokenizer: ../tiny
  kv_events: {endpoint: "tcp://10.0.0.7:5557"}
- {url: "https://example.org/base"}
discovery:
- {file: replicas.yaml}
- {dns: engines, port: 8000, tokenizer: ../tiny, kv_events: {port: 5557}}
optimizations:
- {hypothesis: int8.yaml}
gate: {enforce: warn, max_age: 30d}
"""


def headgate(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headgate", *arguments],
        cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def test_check_says_ok_or_every_problem(tmp_path: Path) -> None:
    """One bad file of two: exit code 2, the good one is still told."""
    model_folder(tmp_path / "tiny")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("version: 1\nruntime: {model: tiny}\n")
    bad.write_text("version: 1\nruntme: {}\ngateway: {port: x}\n")
    done = headgate("policy", "check", str(good), str(bad), str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stdout == f"{good}  ok\n"
    assert done.stderr.splitlines() == [
        f"{bad}:2:1  runtme  unknown field; did you mean 'runtime'?",
        f"{bad}:3:17  gateway.port  expected an integer, got the text 'x'",
        f"{tmp_path / 'none.yaml'}  no such file",
    ]
    assert headgate("policy", "check", str(good)).returncode == 0


def test_check_sees_an_admin_key_that_clients_have_where_it_is_set(tmp_path: Path) -> None:
    """Without the variables the file is fine: keys are not where policies are written."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nupstreams: [{url: 'http://127.0.0.1:9'}]\n"
        "gateway: {tenants: {shop: {key_env: SHOP_KEY}}, admin: {key_env: STEER_KEY}}\n"
    )
    assert headgate("policy", "check", str(file)).returncode == 0
    for command in ("policy check", "serve"):
        done = headgate(*command.split(), str(file), SHOP_KEY="hg-x", STEER_KEY="hg-x")
        assert done.returncode == 2
        assert f"{file}:3:66  gateway.admin.key_env" in done.stderr
        assert "the key of the tenant 'shop', too" in done.stderr


def test_check_looks_into_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    (tmp_path / "tiny" / "model.bin").write_text("")
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nruntime:\n  model: tiny\n")
    done = headgate("policy", "check", str(file))
    assert done.returncode == 2
    assert f"{file}:3:10  runtime.model" in done.stderr
    assert "pickle files can run code" in done.stderr


def test_show_prints_a_file_that_check_takes_and_that_means_the_same(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(WHOLE)
    shown = headgate("policy", "show", str(file))
    assert shown.returncode == 0, shown.stderr
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    assert load(again) == load(file)
    for _, field in every_field(Deployment):
        assert f"# {field.description}" in shown.stdout
    marked = [line.strip() for line in shown.stdout.splitlines() if line.endswith("  # set")]
    assert "port: 9000  # set" in marked
    assert 'served_name: "tiny: 1"  # set' in marked
    assert not any(line.startswith("host:") for line in marked)


def test_show_without_a_file_shows_the_policy_that_ships(tmp_path: Path) -> None:
    shipped = ROOT / "policies" / "local.yaml"
    again = tmp_path / "again.yaml"
    again.write_text(show_file(shipped, {}))
    assert load(again) == load(shipped)
    assert "model: pocket  # set" in headgate("policy", "show").stdout


def test_show_tells_that_the_environment_wins(tmp_path: Path) -> None:
    assert "HEADGATE_PORT=9009 overrides" in headgate("policy", "show", HEADGATE_PORT="9009").stdout
    done = headgate("policy", "show", HEADGATE_PORT="nine")
    assert done.returncode == 2
    assert done.stderr == "HEADGATE_PORT  expected a port from 0 to 65535, got 'nine'\n"


@given(
    st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.booleans() | st.none()
)
def test_a_shown_value_reads_back_as_itself(value: object) -> None:
    """Also `null`, `1e3`, `~` and emoji as text."""
    if isinstance(value, int) and len(str(value)) > 60:
        return
    data, _, problems = parse("x", f"a: {scalar(value)}  # set\n")
    assert not problems
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


@pytest.mark.parametrize(
    "value", ["null", "~", "1e3", "0x1F", "yes", "- a", "a: b", "# a", "", "1.2"]
)
def test_text_that_looks_like_something_else_is_quoted(value: str) -> None:
    data, _, _ = parse("x", f"a: {scalar(value)}\n")
    assert data == {"a": value}


@pytest.mark.parametrize("command", ["serve", "chat", "doctor", "policy", "policy check"])
def test_every_help_has_an_example_and_exit_codes(command: str) -> None:
    text = headgate(*command.split(), "--help").stdout
    assert "Usage: " in text
    if command != "policy":
        assert "Example" in text
        assert "Exit codes" in text


def test_every_field_has_its_line_in_the_documentation() -> None:
    """docs/policy.md says field, default and meaning of all that the schema knows."""
    page = (ROOT / "docs" / "policy.md").read_text()
    for path, field in every_field(Deployment):
        line = next((line for line in page.splitlines() if f"| `{path}` |" in line), None)
        assert line, f"{path} is not in docs/policy.md"
        assert field.description in line, f"{path} is described differently in docs/policy.md"
