"""Policy files: what loads, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.load import (
    FILE_BYTES_MAX,
    PolicyError,
    key_problems,
    load,
    package_problems,
    port_of,
    resolve_adapters,
    resolve_folders,
    with_environment,
    worker_key,
)
from policies.problems import describe, dotted

VALID = """\
version: 1
gateway:
  host: 127.0.0.1
  port: 8080
  drain_s: 5
runtime:
  model: pocket
  device: cpu
upstreams:
  - url: http://127.0.0.1:8000/v1
"""


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "policy.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def problems(folder: Path, text: str | bytes) -> list[str]:
    """The error's lines, each without the file's name."""
    file = write(folder, text)
    with pytest.raises(PolicyError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems)
    assert all(line.startswith(str(file)) for line in lines)
    return [line.removeprefix(str(file)).lstrip(": ") for line in lines]


def test_a_key_that_cannot_be_sent_is_told_at_its_line(tmp_path: Path) -> None:
    """Not set, empty, or with a line end inside; keys that are fine, and none at all, are not."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nupstreams:\n  - url: http://x:1\n  - url: http://y:1\n    api_key_env: KEY\n"
    )
    policy = load(file)
    for environ in ({}, {"KEY": ""}, {"KEY": "  "}):
        (problem,) = key_problems(file, policy, environ)
        assert str(problem) == (
            f"{file}:5:18  upstreams[1].api_key_env  "
            "the environment variable KEY is not set, or empty"
        )
    (problem,) = key_problems(file, policy, {"KEY": "sk\n1"})
    assert "holds what no HTTP header can carry" in str(problem)
    assert "sk" not in problem.message
    assert key_problems(file, policy, {"KEY": "sk-1\n"}) == []


def test_a_valid_file_becomes_a_frozen_deployment(tmp_path: Path) -> None:
    """Values of the file stand beside defaults; the base URL loses its /v1."""
    policy = load(write(tmp_path, VALID))
    assert policy.gateway.drain_s == 5.0
    assert policy.gateway.keep_alive_s == 10.0
    assert policy.runtime is not None
    assert policy.runtime.device == "cpu"
    assert policy.upstreams[0].url == "http://127.0.0.1:8000"


def test_the_policy_that_ships_loads() -> None:
    policies = Path(__file__).parents[2] / "policies"
    for file in policies.glob("*.yaml"):
        load(file)


def test_every_mistake_is_told_in_one_go_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
version: 1
gateway:
  prot: 80
  port: '80'
  drain_s: 3
  drain_s: 4
runtime:
  device: gpu
  dtype: bf-16
  workers: 0
"""
    assert problems(tmp_path, text) == [
        "3:3  gateway.prot  unknown field; did you mean 'port'?",
        "4:9  gateway.port  expected an integer, got the text '80'; write it without quotes",
        "6:3  gateway.drain_s  given twice; the first is on line 5",
        "8:11  runtime.device  expected 'auto', 'cpu' or 'cuda', got the text 'gpu'; "
        "did you mean 'cuda'?",
        "9:10  runtime.dtype  expected 'auto', 'fp32' or 'bf16', got the text 'bf-16'; "
        "did you mean 'bf16'?",
        "10:12  runtime.workers  expected at least 1, got the integer 0",
    ]


EVENTS = "upstreams: [{url: 'http://a', tokenizer: t, kv_events: %s}]"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("port: 9000", "2:1  port  unknown field; did you mean 'gateway.port'?"),
        ("Gatway: {}", "2:1  Gatway  unknown field; did you mean 'gateway'?"),
        ("gateway: {workers: 2}", "2:11  gateway.workers  unknown field; did you mean 'runtime.wo"),
        ("gateway: {max-body-bytes: 2}", "did you mean 'max_body_bytes'?"),
        ("gateway: {xyzzy: 2}", "2:11  gateway.xyzzy  unknown field"),
        ("gateway: {port: yes}", "2:17  gateway.port  expected an integer, got the text 'yes'"),
        ("gateway: {port: true}", "expected an integer, got true"),
        ("gateway: {port: 80.0}", "expected an integer, got the number 80.0"),
        ("gateway: {port: }", "got nothing (null); leave the key out for the default"),
        ("gateway: {port: 65536}", "expected at most 65535, got the integer 65536"),
        ("gateway: {port: 1_000}", "expected an integer, got the text '1_000'"),
        ("gateway: {drain_s: .nan}", "expected a finite number"),
        ("gateway: {drain_s: 1e999}", "expected at most 3600, got the number inf"),
        ("gateway: {connect_timeout_s: 0}", "expected more than 0, got the integer 0"),
        ("gateway: {host: 0.0.0.0}", "is not a loopback address"),
        ("gateway: {host: 1}", "expected text, got the integer 1"),
        ("gateway: 5", "2:10  gateway  expected a mapping with host, port"),
        ("gateway:", "leave the key out for the defaults"),
        ("upstreams: http://a", "expected a list, got the text 'http://a'"),
        ("upstreams: [{}]", "2:13  upstreams[0].url  missing"),
        ("upstreams: [{url: ftp://a}]", "2:19  upstreams[0].url  'ftp://a' is not a base URL"),
        ("upstreams: [{url: 'http://a:99999'}]", "is not a base URL"),
        ("upstreams: [{url: 'http://me:word@a'}]", "2:19  upstreams[0].url  has a user or a pass"),
        ("upstreams: [{url: 'http://me@a'}]", "by api_key_env instead"),
        ("upstreams: [{url: 'http://a?b=c'}]", "has a query"),
        ("discovery: [{}]", "give either `file` or `dns`"),
        ("discovery: [{file: a, dns: b, port: 1}]", "give either `file` or `dns`"),
        ("discovery: [{dns: b}]", "`dns` and `port` go together"),
        ("upstreams: [{url: 'http://a', api_key_env: 9-}]", "expected text that matches"),
        ("upstreams: [{url: 'http://a', kv_events: {endpoint: 'tcp://b:1'}}]", "give `tokenizer`"),
        (EVENTS % "{}", "kv_events.endpoint  missing"),
        (EVENTS % "{endpoint: 'udp://b:1'}", "is not an endpoint such as tcp://"),
        (EVENTS % "{endpoint: 'tcp://b:0'}", "has port 0"),
        (EVENTS % "{endpoint: 'tcp://b:65535', ranks: 2}", "end beyond 65535"),
        ("gateway: !!map {}", "2:10  tag 'tag:yaml.org,2002:map' is not allowed"),
        ("gateway: !python/object {}", "is not allowed"),
        ("<<: {port: 1}", "merge keys (<<) are not YAML 1.2"),
        ("gateway: {[1]: 2}", "2:11  gateway  keys are text"),
        ("gateway: *nowhere", "2:10  alias *nowhere has no anchor before it"),
        ("gateway: &g {port: *g}", "alias *g has no anchor before it"),
        ("--- {}", "2:1  a second document starts here, expected one"),
        ("gateway: [", "not valid YAML: while parsing a flow sequence"),
        ("\tgateway: 1", "(indent with spaces)"),
        ("gateway: a: b", "2:11  not valid YAML: mapping values are not allowed here"),
        ("gateway: \x01", "2:10  character '\\x01' is not allowed in YAML"),
        ('gateway: "\\uD800"', "got the text '\\ud800'"),
        ('"\\uD800\\e[2J": 1', "2:1  '\\\\ud800\\x1b[2J'  unknown field"),
    ],
)
def test_a_mistake_is_told_where_it_is(tmp_path: Path, line: str, told: str) -> None:
    assert told in problems(tmp_path, f"version: 1\n{line}\nruntime: {{}}\n")[0]


def test_version_is_the_integer_one(tmp_path: Path) -> None:
    """`true` and `1.0` equal 1 in Python, and are still not it."""
    for value in ("true", "1.0", "'1'", "2", "null"):
        assert "version" in problems(tmp_path, f"version: {value}\nruntime: {{}}\n")[0]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_lacks_its_version(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)[0].endswith("1  version  missing: Version of this schema.")


@pytest.mark.parametrize("text", ["just words", "[1, 2]", "5"])
def test_a_file_is_a_mapping(tmp_path: Path, text: str) -> None:
    assert "expected a mapping with version, gateway, runtime" in problems(tmp_path, text)[0]


def test_nothing_to_serve_is_said(tmp_path: Path) -> None:
    assert problems(tmp_path, "version: 1\n")[0].endswith(
        "nothing to serve: give `runtime`, `upstreams`, or both"
    )


def test_files_that_cannot_be_read_are_told_alike(tmp_path: Path) -> None:
    for path, told in [(tmp_path / "none.yaml", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(PolicyError, match=told):
            load(path)
    with pytest.raises(PolicyError, match="cannot be read"):
        load("a\0b")
    assert "is not UTF-8: byte 0xff at offset 3" in problems(tmp_path, b"a: \xff\n")[0]
    assert "is larger than" in problems(tmp_path, b"#" * (FILE_BYTES_MAX + 1))[0]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load(write(tmp_path, b"\xef\xbb\xbfversion: 1\nruntime: {}\n")).version == 1


def test_anchors_are_fine_and_bombs_are_not(tmp_path: Path) -> None:
    """Nine lines that would expand to a thousand million values are refused before they do."""
    once = "version: 1\nupstreams:\n  - &a {url: http://a}\n  - *a\n"
    assert len(load(write(tmp_path, once)).upstreams) == 2
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    bomb = "\n".join(["l0: &l0 [" + ", ".join("x" * 10) + "]", *levels])
    assert "holds more than 10000 values, aliases included" in problems(tmp_path, bomb)[0]


def test_depth_is_bounded_with_and_without_aliases(tmp_path: Path) -> None:
    """A chain of anchors nests as deep as brackets do."""
    assert "nested deeper than 32" in problems(tmp_path, "a: " + "[" * 5000)[0]
    chain = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))])
    assert "nested deeper than 32" in problems(tmp_path, chain)[0]


def test_yaml_1_1_is_refused_and_1_2_read_to_the_letter(tmp_path: Path) -> None:
    """In YAML 1.2 `0o17` is fifteen, `0x10` sixteen and `017` seventeen."""
    assert "only YAML 1.2 is read" in problems(tmp_path, "%YAML 1.1\n---\nversion: 1\n")[0]
    for text, value in [("0o17", 15), ("0x10", 16), ("017", 17), ("+17", 17)]:
        policy = load(write(tmp_path, f"version: 1\nruntime: {{workers: {text}}}\n"))
        assert policy.runtime is not None
        assert policy.runtime.workers == value


def test_a_number_of_a_million_digits_is_only_text(tmp_path: Path) -> None:
    """int() of so many digits would raise, or take minutes."""
    told = problems(tmp_path, f"version: 1\ngateway: {{port: {'9' * 100_000}}}\n")
    assert "expected an integer, got the text '999" in told[0]
    assert len(told[0]) < 300


def test_headgate_port_overrides_the_port_and_junk_is_told(tmp_path: Path) -> None:
    policy = load(write(tmp_path, VALID))
    assert with_environment(policy, {"HEADGATE_PORT": "9001"}).gateway.port == 9001
    assert with_environment(policy, {"HEADGATE_PORT": "0"}).gateway.port == 0
    for nothing in ({}, {"HEADGATE_PORT": ""}):
        assert with_environment(policy, nothing).gateway.port == 8080
    for junk in ("80x", "-1", "65536", "8080.0", "٨٠", "9" * 5000):
        with pytest.raises(PolicyError, match="HEADGATE_PORT  expected a port from 0 to 65535"):
            port_of({"HEADGATE_PORT": junk})


def test_what_kubernetes_says_of_a_service_named_headgate_is_no_port_of_ours() -> None:
    """Its variables of Services are called as ours is: each gateway in a pod ended with 2."""
    assert port_of({"HEADGATE_PORT": "tcp://10.96.12.7:80"}) is None


def test_values_and_paths_are_named_as_a_reader_of_yaml_names_them() -> None:
    values = (None, True, 3, 1.5, "a", [], {})
    assert [describe(value) for value in values] == [
        "nothing (null)", "true", "the integer 3", "the number 1.5", "the text 'a'", "a list",
        "a mapping",
    ]  # fmt: skip
    assert dotted(("upstreams", 0, "url")) == "upstreams[0].url"
    assert dotted(("a", "", "b\n")) == "a.''.'b\\n'"


def test_a_missing_folder_of_adapters_is_told_at_its_line(tmp_path: Path) -> None:
    """Relative to the policy file; what is there is found, what is not is named with its place."""
    (tmp_path / "mine").mkdir()
    file = write(tmp_path, "version: 1\nruntime:\n  adapters: mine\n")
    runtime = load(file).runtime
    assert runtime is not None
    assert resolve_adapters(file, runtime) == tmp_path / "mine"
    file = write(tmp_path, "version: 1\nruntime:\n  adapters: theirs\n")
    runtime = load(file).runtime
    assert runtime is not None
    with pytest.raises(PolicyError) as caught:
        resolve_adapters(file, runtime)
    assert str(caught.value).startswith(f"{file}:3:13  runtime.adapters")


@pytest.mark.parametrize(
    ("written", "size"),
    [("0", 0), ("1000", 1000), ("2 GiB", 2**31), ("1.5kB", 1500), ("500 MB", 5 * 10**8)],
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(tmp_path: Path, written: str, size: int) -> None:
    text = (
        f"version: 1\nruntime:\n  tiers:\n    host_bytes: {written}\n"
        "    disk: {path: kv, max_bytes: 1 GiB}\n"
    )
    runtime = load(write(tmp_path, text)).runtime
    assert runtime is not None and runtime.tiers is not None
    assert runtime.tiers.host_bytes == size


def test_a_size_without_sense_says_how_it_is_written(tmp_path: Path) -> None:
    """Also one in bits, one below zero, and tiers that would keep nothing."""
    for written in ("2 Gb", "'1000'", "-1 GiB", "lots"):
        text = f"version: 1\nruntime:\n  tiers:\n    host_bytes: {written}\n"
        (line,) = problems(tmp_path, text)
        assert line.startswith("4:17  runtime.tiers.host_bytes")
        assert "such as 500 MB or 2 GiB" in line
    (line,) = problems(tmp_path, "version: 1\nruntime:\n  tiers: {}\n")
    assert "give `host_bytes`, `disk`, or both" in line


def test_the_folder_of_a_disk_tier_is_relative_to_the_file(tmp_path: Path) -> None:
    """An absolute one stays as it is; nothing else of the policy changes."""
    text = "version: 1\nruntime:\n  tiers:\n    disk: {path: PATH, max_bytes: 1 GiB}\n"
    for path, expected in (("kv/here", tmp_path / "kv" / "here"), ("/kv", Path("/kv"))):
        file = write(tmp_path, text.replace("PATH", path))
        policy = resolve_folders(file, load(file))
        assert policy.runtime and policy.runtime.tiers and policy.runtime.tiers.disk
        assert policy.runtime.tiers.disk.path == str(expected)
        assert policy.runtime.tiers.disk.max_bytes == 2**30
    file = write(tmp_path, "version: 1\nruntime: {}\n")
    assert resolve_folders(file, load(file)) == load(file)


def test_a_home_of_nobody_is_told_at_its_line(tmp_path: Path) -> None:
    text = "version: 1\nruntime:\n  tiers:\n    disk: {path: ~no-such-user/kv, max_bytes: 1 GiB}\n"
    file = write(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        resolve_folders(file, load(file))
    assert str(caught.value).startswith(f"{file}:4:18  runtime.tiers.disk.path")


def test_what_needs_a_package_that_is_missing_is_told_at_its_line(tmp_path: Path) -> None:
    """Found before anything starts, not by the first request that has passages."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nruntime: {}\ngateway:\n  trim:\n    passages:\n      keep: 3\n"
        "  store: {redis: 'redis://127.0.0.1:6379'}\n"
    )
    policy = load(file)
    assert package_problems(file, policy, lambda _: True) == []
    found = package_problems(file, policy, lambda _: False)
    assert [str(one).removeprefix(str(file)) for one in found] == [
        ":7:10  gateway.store  needs the package hiredis: pip install 'headgate[redis]'",
        ":6:13  gateway.trim.passages.keep  needs the package bm25s: pip install 'headgate[trim]'",
    ]


def test_a_server_that_connects_finds_one_process(tmp_path: Path) -> None:
    """Several would all bind the same address, and all but one would hear nothing."""
    file = tmp_path / "policy.yaml"
    line = EVENTS % "{endpoint: 'tcp://127.0.0.1:5557', bind: true}"
    file.write_text(f"version: 1\n{line}\n")
    load(file)
    file.write_text(f"version: 1\n{line}\ngateway: {{processes: 2}}\n")
    with pytest.raises(PolicyError, match="is for one process"):
        load(file)


def test_an_empty_key_of_the_fleet_is_none() -> None:
    """A worker that listens beyond this machine refuses to start without a key."""
    assert worker_key(None, {"HEADGATE_FLEET_KEY": ""}) is None
    assert worker_key(None, {"HEADGATE_FLEET_KEY": "sesame"}) == "sesame"
