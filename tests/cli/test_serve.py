"""`headgate serve`: what it refuses at once, and what it would start."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from command.machine import PortError, bind, cores, free_ports, port_holder, reserve
from command.on_ray import OnRay
from command.serve import Plan, curl, opening, programs_of, ready, threads_of
from policies.load import FLEET_KEY_ENV, load, load_members
from policies.model_folder import served_name
from policies.schema import Runtime
from runtime.__main__ import EXIT_REFUSED
from runtime.wire import RUN_TOKEN_ENV

ROOT = Path(__file__).parents[2]


def headgate(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headgate", *arguments],
        cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def write(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text)
    return file


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def a_plan(folder: Path, text: str) -> Plan:
    """A plan as `serve` makes it, with ports that nobody holds."""
    policy = write(folder, text)
    deployment = load(policy)
    model = folder / "tiny" if deployment.runtime else None
    ports = (7001, 7002) if deployment.runtime else ()
    return Plan(policy, deployment, model, 7000, ports, 3)


TWO = "version: 1\ngateway: {drain_s: 7}\nruntime: {model: tiny, workers: 2}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: 1\nruntme: {}\n", ":2:1  runtme  unknown field; did you mean 'runtime'?"),
        ("version: 1\nruntime: {model: ./gone}\n", ":2:18  runtime.model  no such folder"),
        ("version: 1\nruntime: {model: pickled}\n", "pickle files can run code"),
        ("version: [1\n", "not valid YAML"),
    ],
)
def test_a_wrong_policy_is_told_and_exits_with_2(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_text("")
    file = write(tmp_path, text)
    done = headgate("serve", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(str(file))
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_that_is_taken_is_told_with_its_holder_and_the_way_out(tmp_path: Path) -> None:
    """HEADGATE_PORT is obeyed, and the process that has the port is named."""
    file = write(tmp_path, "version: 1\nupstreams: [{url: http://127.0.0.1:1}]\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = headgate("serve", str(file), HEADGATE_PORT=str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"127.0.0.1:{port} is taken")
    if sys.platform == "linux":
        assert f"(process {os.getpid()})" in done.stderr
    assert re.search(r"free it or HEADGATE_PORT=\d+ headgate serve", done.stderr)


def test_a_key_that_is_not_set_is_told_before_anything_starts(tmp_path: Path) -> None:
    """An empty one is none; once the workers had loaded before the gateway found out."""
    upstream = "{url: 'http://127.0.0.1:1', api_key_env: NO_SUCH_KEY}"
    file = write(tmp_path, f"version: 1\nupstreams: [{upstream}]\n")
    done = headgate("serve", str(file), NO_SUCH_KEY=" ")
    assert done.returncode == 2
    assert f"{file}:2:54  upstreams[0].api_key_env" in done.stderr
    assert "NO_SUCH_KEY is not set, or empty" in done.stderr
    assert done.stdout == ""


def test_a_junk_port_in_the_environment_is_told() -> None:
    done = headgate("serve", HEADGATE_PORT="eighty")
    assert done.returncode == 2
    assert "HEADGATE_PORT  expected a port from 0 to 65535, got 'eighty'" in done.stderr


def test_workers_come_before_the_gateway_that_knows_them_all(tmp_path: Path) -> None:
    model_folder(tmp_path / "tiny")
    plan = a_plan(tmp_path, TWO)
    first, second, front = programs_of(plan)
    policy = str(plan.policy)
    assert first.argv[1:] == (
        "-P", "-m", "runtime", policy, "--port", "7001", "--rank", "0",
    )  # fmt: skip
    assert second.argv[-4:] == ("--port", "7002", "--rank", "1")
    assert front.argv[3:] == (
        "gateway", policy, "--port", "7000",
        "--replica", "http://127.0.0.1:7001", "--replica", "http://127.0.0.1:7002",
    )  # fmt: skip
    assert front.drain_s == 7
    assert (first.refusal, front.refusal) == (EXIT_REFUSED, None)
    assert (first.fact, front.fact) == ("blocks", "replicas")
    assert first.environment["OMP_NUM_THREADS"] == "3"
    assert first.environment["OMP_WAIT_POLICY"] == "passive"
    assert first.environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert "OMP_NUM_THREADS" not in front.environment
    tokens = {program.environment[RUN_TOKEN_ENV] for program in (first, second, front)}
    (token,) = tokens
    assert len(token) == 32
    assert token not in str(programs_of(plan)[0].environment)  # each run has its own


def test_a_worker_that_is_started_again_goes_by_the_policy_of_the_others(tmp_path: Path) -> None:
    """It read an edited file, and replicas of two models stood beside one another."""
    model_folder(tmp_path / "tiny")
    run = tmp_path / "run"
    run.mkdir()
    plan = replace(a_plan(tmp_path, TWO), folder=run)
    worker, _, front = programs_of(plan)
    plan.policy.write_text("version: 1\nruntime: {model: another, kv: int8}\n")
    asked = "import sys; from policies.load import load; print(load(sys.argv[1]).runtime.model)"
    for program, model in ((worker, "tiny"), (front, "another")):  # a gateway reads it again
        told = subprocess.run(
            [sys.executable, "-c", asked, str(plan.policy)],
            env=os.environ | program.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout == f"{model}\n"
    copy = Path(front.argv[front.argv.index("--started") + 1])
    assert copy.read_text() == TWO


def test_upstreams_alone_need_no_worker(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, "version: 1\nupstreams: [{url: http://127.0.0.1:8000/v1}]\n")
    (front,) = programs_of(plan)
    assert "--replica" not in front.argv
    assert "  upstream  http://127.0.0.1:8000" in opening(plan, [front])


def test_on_ray_a_program_keeps_the_replicas_and_the_gateways_read_its_list(tmp_path: Path) -> None:
    """No worker is started here; all share a key for workers elsewhere, which no command shows."""
    model_folder(tmp_path / "tiny")
    plan = replace(
        a_plan(tmp_path, TWO), worker_ports=(), on_ray=OnRay("head:6379", tmp_path), fleet_port=7009
    )
    fleet, front = programs_of(plan)
    book = str(tmp_path / "replicas.yaml")
    assert fleet.argv[3:] == (
        "fleet", str(plan.policy), "--port", "7009", "--book", book, "--address", "head:6379",
        "--gateway", "http://127.0.0.1:7000",
    )  # fmt: skip
    assert front.argv[-2:] == ("--fleet", book)
    assert load_members(book).replicas == ()  # it is there before the first gateway looks
    (key,) = {program.environment[FLEET_KEY_ENV] for program in (fleet, front)}
    assert len(key) == 64
    assert not any(key in word for word in (*fleet.argv, *front.argv))
    assert any("1 to 4 replicas of tiny" in line for line in opening(plan, [fleet, front]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("upstreams: [{url: http://127.0.0.1:1}]", "nothing to run on Ray"),
        ("runtime: {kv_events: {}}", "no gateway hears `runtime.kv_events`"),
    ],
)
def test_what_ray_cannot_serve_is_told_at_once(tmp_path: Path, text: str, told: str) -> None:
    done = headgate("serve", "--on", "ray", str(write(tmp_path, f"version: 1\n{text}\n")))
    assert (done.returncode, done.stdout) == (1, "")
    assert told in done.stderr


def test_an_address_of_ray_without_ray_is_refused(tmp_path: Path) -> None:
    """It was ignored; the variable, which Ray's own nodes have set, still is."""
    file = str(write(tmp_path, "version: 1\nruntime: {model: ./gone}\n"))
    typed = headgate("serve", "--ray-address", "head:6379", file)
    assert (typed.returncode, typed.stdout) == (2, "")
    assert "head:6379: replicas run here, on no Ray cluster; add --on ray" in typed.stderr
    found = headgate("serve", file, RAY_ADDRESS="head:6379")
    assert "runtime.model  no such folder" in found.stderr


def test_what_runs_where_and_what_to_paste_are_printed(tmp_path: Path) -> None:
    model_folder(tmp_path / "tiny")
    plan = a_plan(tmp_path, TWO)
    first = "\n".join(opening(plan, programs_of(plan)))
    assert "http://127.0.0.1:7000" in first
    assert "http://127.0.0.1:7002" in first
    assert f"tiny from {tmp_path / 'tiny'}, 3 threads" in first
    then = ready(plan, 7.26, {"worker 0": {"device": "cpu", "dtype": "float32"}, "gateway": {}})
    assert then[:4] == [
        "ready in 7.3 s",
        "  worker 0  cpu, float32",
        "  metrics   http://127.0.0.1:7001/metrics",
        "  metrics   http://127.0.0.1:7002/metrics",
    ]
    assert "  http://127.0.0.1:7000/v1" in then  # gates and rollouts wait for this very line
    assert "  http://127.0.0.1:7000/console" in then
    assert any("headgate chat --url http://127.0.0.1:7000" in line for line in then)


def test_the_curl_line_is_one_shell_command_with_a_json_body() -> None:
    """Whatever the model is called; where there are keys, with one."""
    for name, keys in (("pocket", False), ('it\'s "mine"', True)):
        words = shlex.split("\n".join(curl("http://127.0.0.1:8080", name, keys=keys)))
        assert words[:3] == ["curl", "-N", "http://127.0.0.1:8080/v1/chat/completions"]
        assert ("Authorization: Bearer $HEADGATE_API_KEY" in words) == keys
        body = __import__("json").loads(words[-1])
        assert body["model"] == name
        assert body["stream"] is True
        assert "4659-1394" in body["messages"][1]["content"]


def test_the_served_name_is_the_last_part_of_the_model() -> None:
    assert served_name(Runtime(), Path("/x/pocket/target")) == "pocket"
    assert served_name(Runtime(model="m/tiny"), Path("/x/m/tiny")) == "tiny"
    assert served_name(Runtime(model="owner/name"), "owner/name") == "name"
    assert served_name(Runtime(served_name="mine"), Path("/x")) == "mine"


def test_threads_come_from_the_policy_then_the_environment_then_the_cores() -> None:
    assert threads_of(Runtime(threads=5), {"OMP_NUM_THREADS": "7"}) == 5
    assert threads_of(Runtime(), {"OMP_NUM_THREADS": "7"}) == 7
    assert threads_of(Runtime(), {"OMP_NUM_THREADS": "many"}) == cores()
    assert threads_of(Runtime(workers=64), {}) == 1 or cores() > 64


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    bind("127.0.0.1", ports[0]).close()


def test_a_reserved_port_is_shared_by_its_gateways_and_nobody_else() -> None:
    """Several listen behind a reservation; a second `headgate serve` does not join them."""
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with (
            socket.create_server(("127.0.0.1", port), reuse_port=True),
            socket.create_server(("127.0.0.1", port), reuse_port=True),
        ):
            for take in (bind, reserve):
                with pytest.raises(PortError, match="is taken"):
                    take("127.0.0.1", port)


def test_a_port_holder_is_found_or_not() -> None:
    (port,) = free_ports(1)
    assert port_holder(port) is None
    with pytest.raises(PortError, match="cannot be used here"):
        bind("no.such.host.invalid", 1)
