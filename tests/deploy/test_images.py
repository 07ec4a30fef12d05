"""The Dockerfile: linted, and its gateway proved to serve with nothing but what is installed."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from command.machine import free_ports
from deploy.requirements import requirements

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "Dockerfile").read_text()

# The gateway's sitecustomize: an import of anything else fails as if it was not there.
FENCE = """
import sys
class Fence:
    beyond = frozenset({beyond!r})
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.beyond:
            raise ModuleNotFoundError(f"{{name}} is not in the image", name=name)
sys.meta_path.insert(0, Fence())
"""


def extras(target: str) -> list[str]:
    stage = RECIPE.split(f"AS {target}-packages\n")[1].split("\nFROM")[0]
    found = re.search(r'ARG EXTRAS="([^"]*)"', stage)
    assert found is not None
    return found[1].split()


def closure(wanted: list[str]) -> set[str]:
    """The distributions that pip installs for these requirements."""
    found: set[str] = set()
    todo = [(Requirement(one), frozenset[str]()) for one in wanted]
    while todo:
        need, asked = todo.pop()
        if need.marker and not any(need.marker.evaluate({"extra": one}) for one in asked | {""}):
            continue
        name = canonicalize_name(need.name)
        told = distribution(name).requires or []
        if name not in found or need.extras:
            found.add(name)
            todo += [(Requirement(one), frozenset(need.extras)) for one in told]
    return found


def test_a_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_run_as_somebody_and_end_where_compose_begins() -> None:
    for target in ("gateway", "runtime"):
        stage = RECIPE.split(f" AS {target}\n")[1].split("\nFROM")[0]
        assert "USER 10001:10001" in stage


def test_what_the_builder_copies_is_there_and_is_let_in() -> None:
    """A new package of ours that .dockerignore does not know would be missing from the images."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    needed = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed |= {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
    assert needed <= let_in
    for name in let_in:
        assert (ROOT / name).exists(), name


def test_files_beside_the_source_are_installed_too() -> None:
    """Images have what a wheel has: a page, a policy or a weight that `package-data` does not name
    is there in a checkout and nowhere else."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name: ROOT / name.replace(".", "/") for name in told["packages"]}
    named = {
        file
        for name, patterns in told["package-data"].items()
        for pattern in patterns
        for file in packages[name].glob(pattern)
    }
    listed = subprocess.run(
        ["git", "ls-files", "-z", *map(str, packages.values())],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a checkout of git: what belongs to the source cannot be told")
    tracked = {ROOT / name for name in listed.stdout.split("\0") if name and name[-3:] != ".py"}
    assert not sorted(str(file.relative_to(ROOT)) for file in tracked - named)


def test_the_gateway_image_has_no_torch_and_the_runtime_image_has() -> None:
    light, heavy = (closure(requirements(extras(one))) for one in ("gateway", "runtime"))
    assert not light & {"torch", "transformers", "scipy"}
    assert {"torch", "transformers"} <= heavy


@pytest.fixture(scope="module")
def fence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fence")
    installed = closure(requirements(extras("gateway")))
    beyond = {
        module
        for module, names in packages_distributions().items()
        if not {"headgate", *installed} & {canonicalize_name(name) for name in names}
    }
    assert {"torch", "transformers", "numpy", "pytest"} <= beyond
    (folder / "sitecustomize.py").write_text(FENCE.format(beyond=sorted(beyond)))
    return folder


class Engine(http.server.BaseHTTPRequestHandler):
    """As much of an OpenAI-compatible server as one answer takes."""

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "pocket", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": "Packed."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.answer({"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]})

    def answer(self, body: dict[str, object]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_gateway_serves_with_only_what_its_image_installs(
    fence: Path, engine: str, tmp_path: Path
) -> None:
    """Everything that the stack's policy asks of it (exact prompts, a shared store, events), behind
    a fence around what the image has not."""
    (port,) = free_ports(1)
    policy = tmp_path / "policy.yaml"
    tokenizer = ROOT / "pocket" / "target"
    policy.write_text(
        "version: 1\ngateway:\n  store: {redis: 'redis://127.0.0.1:1'}\n"
        "  tenants: {local: {key_env: HEADGATE_KEY}}\n  trim: {drop: oldest}\n"
        f"upstreams:\n- {{url: '{engine}', kind: vllm, tokenizer: {tokenizer}, "
        f"kv_events: {{endpoint: 'ipc://{tmp_path}/kv'}}}}\n"
    )
    environ = os.environ | {"PYTHONPATH": f"{fence}:{ROOT}", "HEADGATE_KEY": "hg-test"}
    gateway = subprocess.Popen(
        [sys.executable, "-P", "-m", "gateway", policy, "--port", str(port)],
        cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    key = {"authorization": "Bearer hg-test"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=key, timeout=30) as client:
        try:
            ends_at = time.monotonic() + 60
            while not ready(client):
                assert gateway.poll() is None, gateway.communicate()[1]
                assert time.monotonic() < ends_at
                time.sleep(0.05)
            body = {"model": "pocket", "messages": [{"role": "user", "content": "Hello there."}]}
            answer = client.post("/v1/chat/completions", json=body)
            receipt = client.get(f"/v1/receipts/{answer.headers['x-headgate-receipt']}")
        finally:
            gateway.terminate()
            _, said = gateway.communicate(timeout=30)
    assert answer.status_code == 200, said
    assert receipt.json()["exact"] is True, "its tokenizer was not there"
    assert "not in the image" not in said


def ready(client: httpx.Client) -> bool:
    """It serves, and its tokenizer, which it loads in the background, is there."""
    try:
        health = client.get("/health")
        return health.status_code == 200 and health.json()["prompts"]["tokenizers"] == 1
    except httpx.TransportError:
        return False
