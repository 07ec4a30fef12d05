"""compose.yaml: valid by its specification's schema, hardened, and naming only what is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from ruamel.yaml import YAML

from command.probe import main as probe
from deploy.keys import NAMES
from deploy.local.compose import ComposeError, duration_s, interpolate, read
from deploy.local.places import Places
from policies.load import key_problems, load

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose.yaml"
ENVIRON = {name: f"hg-test-{at}" for at, name in enumerate(NAMES)}
FREE = ENVIRON | {"HEADGATE_PORT": "0"}  # whoever has the usual one
WHOLE: dict[str, Any] = YAML(typ="safe").load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = WHOLE["services"]
VLLM = ("vllm-0", "vllm-1")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / argv[0]), *argv[1:]],
        cwd=ROOT, env=os.environ | ENVIRON, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_it_follows_the_specification_s_schema() -> None:
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def as_docker_compose_reads_it(*environments: str) -> dict[str, dict[str, Any]]:
    """The services that it would run, with everything filled in."""
    if not (Path(sys.executable).parent / "docker-compose").exists():
        pytest.skip("docker-compose is on Linux alone: its package has no build for here")
    files = (f"--env-file=deploy/stack/{one}" for one in environments)
    done = run("docker-compose", "--env-file=/dev/null", *files, "config", "--format=json")
    assert done.returncode == 0, done.stderr
    services: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize(
    ("environments", "more"),
    [
        (["gpu.env"], {"runtime-gpu"}),
        (["vllm.env"], set(VLLM)),
        (["observe.env"], {"collector", "jaeger", "prometheus", "grafana"}),
    ],
)
def test_docker_compose_runs_what_an_environment_is_for(
    environments: list[str], more: set[str]
) -> None:
    """Other engines in place of the two runtimes, or all that looks on beside them."""
    plain, told = as_docker_compose_reads_it(), as_docker_compose_reads_it(*environments)
    assert told.keys() - plain.keys() == more
    left = {name for name, one in told.items() if one["deploy"].get("replicas", 1)}
    away = set() if "observe.env" in environments else {"runtime-0", "runtime-1"}
    assert plain.keys() - left == away


def test_make_stack_starts_what_docker_compose_would() -> None:
    """Ours reads the part of the specification that our file uses: commands, environment, files,
    checks, order and ends are those that the original reads."""
    theirs = as_docker_compose_reads_it()
    ours = {one.name: one for one in read(FILE, ENVIRON)}
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        told = theirs[name]
        assert list(one.argv) == [*(told["entrypoint"] or ()), *told["command"]]
        assert dict(one.environment) == told.get("environment", {})
        mounts = {(ROOT / m.source if not m.is_volume else m.source, m.target) for m in one.mounts}
        assert {(str(source), target) for source, target in mounts} == {
            (volume["source"], volume["target"]) for volume in told.get("volumes", ())
        }
        assert list(one.scratch) == [at.partition(":")[0] for at in told.get("tmpfs", ())]
        assert [str(port) for port in one.ports] == told["expose"]
        assert {
            (str(outside), inside) for inside, outside in one.published.items()
        } == {(port["published"], port["target"]) for port in told.get("ports", ())}  # fmt: skip
        needs = {
            other: rule["condition"] == "service_healthy"
            for other, rule in told.get("depends_on", {}).items()
            if other in theirs
        }
        assert dict(one.needs) == needs
        check = told["healthcheck"]
        assert one.check is not None
        assert ["CMD", *one.check.argv] == check["test"]
        assert one.check.every_s == duration_s(check["start_interval"])
        assert one.stop_signal == told.get("stop_signal", "SIGTERM")
        assert one.grace_s == duration_s(told["stop_grace_period"])


def test_a_linter_of_container_security_finds_only_what_is_known() -> None:
    """Digests cannot be known where nothing can be pulled; vLLM's image is its makers'; who judges
    compiles for whoever it runs as, and code on what is mounted noexec cannot be loaded."""
    done = run("compose-lint", "--format", "json", "compose.yaml")
    found = {(one["rule_id"], one["service"]) for one in json.loads(done.stdout)["findings"]}
    others = {(rule, service) for rule, service in found if rule != "CL-0019"}
    assert others == {("CL-0007", one) for one in VLLM} | {("CL-0022", "judge")}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_unprivileged_and_pinned(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert {"cpus", "memory", "pids"} <= limits.keys()
    assert service["cap_drop"] == ["ALL"]
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), "an image is pinned to a version"
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), "what is published is for this machine alone"
    if name not in VLLM:
        assert service["read_only"] is True
        assert int(service["user"].split(":")[0]) > 0
    if name == "judge":
        assert service["restart"] == "no"  # a command that ends by itself
    elif name not in ("collector", "jaeger"):  # their images have nothing that could ask
        assert service["healthcheck"]["test"][0] == "CMD"


def test_redis_is_only_in_its_gateways_network() -> None:
    """It asks for no password: whoever reaches it reads and changes what gateways share."""
    inside = {name for name, service in SERVICES.items() if "state" in service.get("networks", ())}
    assert inside == {"redis", "gateway-0", "gateway-1"}
    assert WHOLE["networks"]["state"] == {"internal": True}


def vllm_options(**environ: str) -> dict[str, str]:
    told = [interpolate(word, ENVIRON | environ) for word in SERVICES["vllm-0"]["command"]]
    return {word.partition("=")[0]: word.partition("=")[2] for word in told}


def test_vllm_counts_the_tokens_that_it_found_and_sends_traces_where_they_are_collected() -> None:
    """Without the first the hit ladder is empty: it counts no answer that does not say. The second
    only where observe.env says so, to a collector that both networks lead to."""
    plain = vllm_options()
    assert {"--enable-prompt-tokens-details", "--enable-prefix-caching"} <= plain.keys()
    assert not [name for name in plain if "otlp" in name or not name.startswith("--")]
    lines = (ROOT / "deploy" / "stack" / "observe.env").read_text().splitlines()
    traced = vllm_options(**dict(line.split("=", 1) for line in lines if line[:1] != "#"))
    assert traced.keys() - plain.keys() == {"--otlp-traces-endpoint"}
    host, port = re.findall(r"http://([a-z]+):(\d+)/", traced["--otlp-traces-endpoint"])[0]
    assert port in SERVICES[host]["expose"]
    for name in VLLM:
        assert set(SERVICES[name]["networks"]) & set(SERVICES[host]["networks"]), name
        assert SERVICES[name]["environment"]["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == (
            "http/protobuf" if port == "4318" else "grpc"
        )


@pytest.mark.parametrize("profile", ["", "gpu.env", "vllm.env"])
def test_everything_that_it_names_exists(profile: str) -> None:
    """Folders, files, variables' defaults and policies, by each of the environments."""
    environ = dict(ENVIRON)
    if profile:
        lines = (ROOT / "deploy" / "stack" / profile).read_text().splitlines()
        environ |= dict(line.split("=", 1) for line in lines if not line.startswith("#"))
        assert environ.pop("COMPOSE_PROFILES") in {
            one for service in SERVICES.values() for one in service.get("profiles", ())
        }
        for name in set(environ) - set(ENVIRON):
            assert f"${{{name}" in FILE.read_text(), f"{name} is read by nobody"
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = interpolate(volume, environ).split(":")[0]
            there = (ROOT / source).exists() if source[0] in "./" else source in WHOLE["volumes"]
            assert there, source
        for network in service["networks"]:
            assert network in WHOLE["networks"]


@pytest.mark.parametrize("policy", ["stack.yaml", "gpu.yaml", "vllm.yaml"])
def test_its_policies_are_valid_and_name_services_that_run_with_them(policy: str) -> None:
    file = ROOT / "deploy" / "stack" / policy
    deployment = load(file)
    assert key_problems(file, deployment, ENVIRON) == []
    assert deployment.gateway.admin.key_env == "HEADGATE_ADMIN_KEY"
    profile = policy.removesuffix(".yaml")
    for upstream in deployment.upstreams:
        name, port = upstream.url.removeprefix("http://").split(":")
        assert SERVICES[name].get("profiles", ["stack"]) == [profile]
        assert port in SERVICES[name]["expose"]
        for address in re.findall(r"tcp://([\w-]+):(\d+)", str(upstream.kv_events)):
            assert address[0] == name
            assert address[1] in SERVICES[name]["expose"]


@pytest.mark.parametrize("policy", ["runtime.yaml", "gpu-runtime.yaml"])
def test_the_runtimes_policies_are_valid_and_say_nothing_of_others(policy: str) -> None:
    """What a gate judges of an engine is what any machine can start: no address is in it."""
    file = ROOT / "deploy" / "stack" / policy
    deployment = load(file)
    assert key_problems(file, deployment, ENVIRON) == []
    assert deployment.runtime is not None
    assert not deployment.upstreams
    front = load(file.with_name({"runtime.yaml": "stack.yaml"}.get(policy, "gpu.yaml")))
    assert front.runtime is None, (
        "gateways have no torch that could tell what a verdict is bound to"
    )
    told = {one.kv_events.endpoint for one in front.upstreams if one.kv_events}
    assert deployment.runtime.kv_events is not None
    assert deployment.runtime.kv_events.endpoint in told


def test_one_ledger_is_read_by_all_that_serve_and_written_by_who_judges() -> None:
    """A pass that only one side saw would be on in gateways and off in runtimes."""
    mounts = {
        name: next((v for v in service["volumes"] if ":/var/lib/headgate/ledger" in v), None)
        for name, service in SERVICES.items()
        if service.get("image", "").startswith("headgate-")
    }
    assert mounts.pop("judge") == "${HEADGATE_LEDGER:-ledger}:/var/lib/headgate/ledger"
    assert set(mounts) == {"gateway-0", "gateway-1", "runtime-0", "runtime-1", "runtime-gpu"}
    assert set(mounts.values()) == {"${HEADGATE_LEDGER:-ledger}:/var/lib/headgate/ledger:ro"}
    for file in (ROOT / "deploy" / "stack").glob("*.yaml"):
        assert load(file).gate.ledger == "/var/lib/headgate/ledger", file


def test_each_address_in_what_is_mounted_is_a_service_s() -> None:
    known = {
        f"{name}:{port}" for name, service in SERVICES.items() for port in service.get("expose", ())
    }
    for file in (ROOT / "deploy").rglob("*.y*ml"):
        named = re.findall(r"(?<![\w.-])([a-z][a-z-]*(?:-\d)?:\d{4,5})\b", file.read_text())
        if "kubernetes" not in file.parts:
            assert {one for one in named if one.split(":")[0] in SERVICES} <= known, file


# ---- how it is read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A and ${A}", "one and one"),
        ("$$A costs $$5", "$A costs $5"),
        ("${NONE:-two}${A:-two}", "twoone"),
        ("${EMPTY:-three}${EMPTY-three}", "three"),
        ("${NONE:-${ALSO:-${A}}}", "one"),
        ('--json={"a":{"b":"${A}"}}', '--json={"a":{"b":"one"}}'),
        ("${NONE}", ""),
        ("a${A:+-${A}}b${NONE:+-c}d${EMPTY:+-e}${EMPTY+f}", "a-onebdf"),
    ],
)
def test_variables_are_filled_in_as_the_specification_has_it(text: str, value: str) -> None:
    assert interpolate(text, {"A": "one", "EMPTY": ""}) == value


@given(st.text(alphabet="ab{}:-?/. ", max_size=40))
def test_a_text_without_variables_stays(text: str) -> None:
    assert interpolate(text, {}) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_is_missing_is_named_with_what_makes_it(name: str) -> None:
    """None stands in for another: a client's would open what is not a client's."""
    with pytest.raises(ComposeError, match=f"{name} is not set: python3 -m deploy.keys"):
        read(FILE, {other: key for other, key in ENVIRON.items() if other != name})


def test_each_key_is_known_only_where_it_is_asked_for_or_sent() -> None:
    """Gateways, and who starts one to judge, have all but Grafana's; engines only their own; who
    scrapes sends two."""
    knows = {
        name: {key for key in NAMES if f"${{{key}" in str(service.get("environment", ""))}
        for name, service in SERVICES.items()
    }
    gateways = set(NAMES) - {"HEADGATE_GRAFANA_PASSWORD"}
    engines = ("runtime-0", "runtime-1", "runtime-gpu", *VLLM)
    assert {name: keys for name, keys in knows.items() if keys} == {
        "gateway-0": gateways,
        "gateway-1": gateways,
        "judge": gateways,
        "prometheus": {"HEADGATE_ADMIN_KEY", "HEADGATE_WORKER_KEY"},
        "grafana": {"HEADGATE_GRAFANA_PASSWORD"},
    } | {name: {"HEADGATE_WORKER_KEY"} for name in engines}
    password = SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
    assert interpolate(password, ENVIRON) == ENVIRON["HEADGATE_GRAFANA_PASSWORD"]


def test_commands_with_an_environment_of_their_own_name_that_of_the_keys_first() -> None:
    """With `--env-file` Compose does not look at `.env` by itself."""
    pages = [FILE, ROOT / "docs" / "stack.md", *(ROOT / "deploy" / "stack").glob("*.env")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    named = [line for line in lines if "--env-file" in line]
    assert len(named) > 6
    for line in named:
        assert "--env-file .env" in line.partition("--env-file deploy")[0], line


def test_durations() -> None:
    assert [duration_s(text) for text in ("500ms", "30s", "1m30s", "2h")] == [0.5, 30, 90, 7200]
    with pytest.raises(ComposeError, match="'soon' is not a duration"):
        duration_s("soon")


def test_what_others_need_comes_first_and_the_edge_last() -> None:
    services = read(FILE, ENVIRON)
    names = [service.name for service in services]
    assert names[-1] == "edge"
    assert set(names) == {"edge", "gateway-0", "gateway-1", "redis", "runtime-0", "runtime-1"}
    for place, service in enumerate(services):
        assert set(service.needs) <= set(names[:place])


def test_words_of_a_container_become_this_machine_s(tmp_path: Path) -> None:
    """Other services' addresses, its own, whatever address it listens on, and its paths; what only
    looks like one of them stays."""
    services = {one.name: one for one in read(FILE, FREE)}
    places = Places.of(list(services.values()), tmp_path)
    put = places.words(services["gateway-0"])
    own, redis = places.ports["gateway-0"][8080], places.ports["redis"][6379]
    assert put("redis://redis:6379/0") == f"redis://127.0.0.1:{redis}/0"
    assert put("bind :8080") == f"bind 127.0.0.1:{own}"
    assert put("http://127.0.0.1:8080/health") == f"http://127.0.0.1:{own}/health"
    assert put("host: 0.0.0.0") == "host: 127.0.0.1"
    assert put("ipc:///run/headgate/kv") == f"ipc://{tmp_path}/volumes/kv-events/kv"
    for stays in (
        "my-redis:6379",
        "redis:63790",
        "10.0.0.0:9",
        "/run/headgates",
        "127.0.0.1:80800",
    ):
        assert put(stays) == stays
    assert places.argv(services["gateway-0"], ["--port", "8080"]) == ("--port", str(own))


@pytest.mark.parametrize("port", ["abc", "99999", "-1", "8080/tcp", "\u0662"])
def test_a_port_that_is_none_is_told_where_it_stands(port: str) -> None:
    """HEADGATE_PORT=abc ended with a traceback."""
    with pytest.raises(ComposeError, match=r"expected a port from 0 to 65535, got '") as told:
        read(FILE, ENVIRON | {"HEADGATE_PORT": port})
    assert port in str(told.value)


def test_a_policy_that_is_no_text_is_told_by_its_name(tmp_path: Path) -> None:
    """Bytes, or nothing at all, under HEADGATE_POLICY: what, whose, and why, and no traceback."""
    for name, content, why in (
        ("binary.yaml", b"\xff\xfe\x00", "it is not text in UTF-8"),
        ("lost.yaml", None, "which does not exist"),
    ):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        services = read(FILE, FREE | {"HEADGATE_POLICY": str(file)})
        (gateway,) = [one for one in services if one.name == "gateway-0"]
        with pytest.raises(ComposeError, match=f"gateway-0 mounts {file}.* {why}"):
            Places.of(services, tmp_path / "places").settle(gateway, ROOT)


# ---- health checks ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["ftp://127.0.0.1/x"], ["http://[::1]:1/"]])
def test_the_probe_of_what_is_not_well_fails_and_says_why(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(arguments) == 1
    assert capsys.readouterr().err
