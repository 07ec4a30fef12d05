"""The stack as processes: what compose.yaml runs comes up, answers through one port, outlives its
parts, and ends without a trace. One stack for all tests of this file, in their order."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from deploy.keys import NAMES
from policies.binding import ledger_of
from policies.devices import devices
from policies.ledger import Decision, Ledger
from policies.load import load_hypothesis
from tests.deploy.promql import wanted
from tests.deploy.test_observe import panels, rules, variables
from tests.docs.pages import missing, steps
from tests.docs.typed import complaint
from tests.policies.gated_world import HYPOTHESIS, verdict_on

ROOT = Path(__file__).parents[2]
NEEDED = ("redis-server", "redis-cli", "haproxy", "wget")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LOST = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
pytestmark = pytest.mark.skipif(bool(LOST), reason=f"not installed here: {', '.join(LOST)}")

KEYS = {name: f"hg-test-of-the-stack-{at}" for at, name in enumerate(NAMES)}
KEY = KEYS["HEADGATE_KEY"]
STEERS = {"authorization": f"Bearer {KEYS['HEADGATE_ADMIN_KEY']}"}
WORKER_KEY = f"Bearer {KEYS['HEADGATE_WORKER_KEY']}"
LIMIT_S = 180.0  # against hanging: torch alone imports for a minute where others use the cores
ASK = {
    "model": "pocket", "temperature": 0, "max_tokens": 200, "ignore_eos": True, "stream": True,
    "messages": [{"role": "user", "content": "Count: one, two, three, and so on."}],
}  # fmt: skip


@dataclass(frozen=True)
class Stack:
    process: subprocess.Popen[str]
    client: httpx.Client
    said: list[str]
    log: Path
    ledger: Path

    def processes_of(self, *words: str) -> list[psutil.Process]:
        """The services whose commands have these words."""
        return list(self._found(words))

    def process_of(self, *words: str) -> psutil.Process:
        return next(self._found(words))

    def _found(self, words: Sequence[str]) -> Iterator[psutil.Process]:
        for one in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                if set(words) <= set(one.cmdline()):
                    yield one

    def metrics(self, gateway: str) -> str:
        return self.client.get(f"{self.url(gateway)}/metrics", headers=STEERS).text

    def optimization(self, gateway: str, name: str) -> list[str]:
        """Its state in the gateway, or in each of the runtimes behind it, as whoever has a key
        sees it."""
        told = self.client.get(f"{self.url(gateway)}/v1/fingerprint").json()
        places = [told, *(one["fingerprint"] for one in told["data"])]
        return [
            f"{one['state']} {one['enabled']}"
            for place in places
            for one in place["optimizations"]
            if one["hypothesis"] == name
        ]

    def runtime_at_work(self) -> psutil.Process:
        for rank in ("0", "1"):
            page = self.client.get(
                f"{self.url(f'runtime-{rank}')}/health", headers={"authorization": WORKER_KEY}
            ).json()
            if page["running"]:
                return self.process_of("--rank", rank)
        raise AssertionError("no runtime has a running answer")

    def until(self, holds: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < ends_at, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def url(self, name: str) -> str:
        (line,) = [line for line in self.said if line.split()[:1] == [name]]
        return f"http://{line.split()[1]}"

    def sees_both(self, gateway: str) -> bool:
        health = self.client.get(f"{self.url(gateway)}/health").json()
        return [one["healthy"] for one in health["replicas"]] == [True, True]

    def well(self, name: str) -> bool:
        try:
            return self.client.get(f"{self.url(name)}/health").status_code == 200
        except httpx.TransportError:
            return False


# On top of the stack's own policies: all that has metrics. A panel of what is off shows nothing.
GATEWAYS = {
    "gateway": {
        "trim": {"drop": "oldest", "budget_tokens": 512},
        "tiers": {"hopeless": {"ttft_ms": 1}},
        "response_cache": {"tiers": ["batch"]},
        "record": {"consent": "given", "path": "/tmp/recorded"},
    },
    "optimizations": [
        {"hypothesis": "hypotheses/response-cache.yaml"},
        {"hypothesis": "hypotheses/fewer.yaml"},
    ],
}
RUNTIMES = {
    "runtime": {"speculation": "ngram", "tiers": {"host_bytes": "16 MiB"}},
    "optimizations": [{"hypothesis": "hypotheses/steps.yaml"}],
}
# Of the operator: the first on the engines, the second on the gateways.
OWN = {
    "steps": ("runtime.yaml", "{runtime.step_tokens: 192}", "lossless_exact"),
    "fewer": ("stack.yaml", "{gateway.running_per_replica: 48}", "routing_only"),
}


ROOTS = {"baseline": "before", "candidate": "after", "spec": "asked"}  # of the rollout below


def proposed(folder: Path, name: str, beside: Path | None = None) -> Path:
    """A hypothesis, on the policy in the folder above it or `beside`."""
    policy, patch, kind = OWN[name]
    text = HYPOTHESIS.format(
        name=name, patch=patch, kind=kind, source="suite: pocket", metric="correct",
        test="paired_ni",
    )  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(text.replace("policy.yaml", str(beside or Path("..", policy))))
    return file


def judged(folder: Path) -> tuple[Path, Path]:
    """The hypotheses, and a ledger with a verdict on one of ours, which is an hour old and about
    something else than what is served."""
    hypotheses = folder / "hypotheses"
    shutil.copytree(ROOT / "policies" / "hypotheses", hypotheses)
    for name in OWN:
        proposed(hypotheses, name)
    now = time.time()
    verdict = Decision(
        "verdict", "response-cache", **ROOTS, at=now - 3600, decision="pass",
        expires_at=now + 86400,
    )  # fmt: skip
    ledger = Ledger.open(folder / "ledger")
    ledger.record(verdict)
    return hypotheses, ledger.folder


def passed_elsewhere(folder: Path, ledger: Path, runtime: Path) -> None:
    """A pass on the engines, as `headgate gate run` records one on this machine: by a policy of its
    own, which says the same of the engine and names the model and the ledger where they lie."""
    yaml = YAML(typ="safe")
    policy = yaml.load(runtime.read_text())
    policy["runtime"]["model"] = str(ROOT / "pocket" / "target")
    policy["gate"]["ledger"] = str(ledger)
    folder.mkdir()
    (folder / "hypotheses").mkdir()
    file = proposed(folder / "hypotheses", "steps")
    yaml.dump(policy, folder / "runtime.yaml")
    hypothesis = load_hypothesis(file)
    verdict = verdict_on(file, at=time.time(), devices=devices())
    ledger_of(file, hypothesis).record_verdict(verdict)


def whole_policy(name: str, more: dict[str, Any], file: Path) -> Path:
    yaml = YAML(typ="safe")
    policy = yaml.load((ROOT / "deploy" / "stack" / name).read_text())
    for part, said in more.items():
        if isinstance(said, dict):
            policy[part].update(said)
        else:
            policy[part] = said
    yaml.dump(policy, file)
    return file


class Collector(http.server.BaseHTTPRequestHandler):
    """Notes who sends traces; that they are right, tests of tracing say."""

    services: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces" and self.headers["content-encoding"] is None:
            self.services.update(
                name for name in ("headgate-gateway", "headgate-runtime") if name.encode() in body
            )
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def stack(collector: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    log = folder / "log"
    hypotheses, ledger = judged(folder)
    runtime = whole_policy("runtime.yaml", RUNTIMES, folder / "runtime.yaml")
    passed_elsewhere(folder / "elsewhere", ledger, runtime)
    environ = (
        os.environ
        | KEYS
        | {
            "HEADGATE_PORT": "0",
            "HEADGATE_OTLP": collector,
            "HEADGATE_RUNTIME_CPUS": "1",
            "HEADGATE_POLICY": str(whole_policy("stack.yaml", GATEWAYS, folder / "stack.yaml")),
            "HEADGATE_RUNTIME_POLICY": str(runtime),
            "HEADGATE_HYPOTHESES": str(hypotheses),
            "HEADGATE_LEDGER": str(ledger),
        }
    )
    with log.open("w") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local"],
            cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=words, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    said = []
    for line in process.stdout:
        said.append(line.rstrip())
        if line.startswith("Ctrl-C"):
            break
    watchdog.cancel()
    assert any(line.startswith("ready in") for line in said), log.read_text()[-3000:]
    (base,) = [line.strip() for line in said if re.fullmatch(r"  http://\S+/v1", line)]
    key = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{base}/", headers=key, timeout=LIMIT_S) as client:
        yield Stack(process, client, said, log, ledger)
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


def content(lines: Iterator[str]) -> str:
    """The text of a stream that came whole."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-1]
    chunks = [json.loads(event) for event in events[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )


def test_one_port_answers_for_whoever_has_the_key(stack: Stack) -> None:
    """Both gateways are asked, and take the same key; neither worker does."""
    assert stack.client.get("models").json()["data"][0]["id"] == "pocket"
    assert httpx.get(str(stack.client.base_url.join("models"))).status_code == 401
    for name in ("gateway-0", "gateway-1"):
        stack.until(partial(stack.sees_both, name))
        health = stack.client.get(f"{stack.url(name)}/health").json()
        assert health["state"]["store"] == "redis", health
    for name in ("runtime-0", "runtime-1"):
        assert stack.client.get(f"{stack.url(name)}/metrics").status_code == 401
        assert httpx.get(f"{stack.url(name)}/health").json() == {"status": "ready"}


def test_a_client_s_key_opens_no_other_door(stack: Stack) -> None:
    """Neither what steers nor an engine; and that of who steers asks no model."""
    for path in ("/admin/traces", "/admin/variants", "/gate/any"):
        page = str(stack.client.base_url.join(path))
        assert stack.client.get(page).status_code == 401, path
        assert stack.client.get(page, headers=STEERS).status_code != 401, path
    assert stack.client.get("models", headers=STEERS).status_code == 401
    assert stack.client.get(f"{stack.url('gateway-0')}/metrics").status_code == 401
    assert "requests_in_flight" in stack.metrics("gateway-0")
    for name in ("runtime-0", "runtime-1"):
        for headers in ({}, STEERS):
            answer = stack.client.get(f"{stack.url(name)}/v1/models", headers=headers)
            assert answer.status_code == 401, name


def test_a_stream_comes_through_the_port_as_it_is_made(stack: Stack) -> None:
    """Nothing is held back: the first token is there while the gateway says that it works on it."""
    with stack.client.stream("POST", "chat/completions", json=ASK) as answer:
        lines = answer.iter_lines()
        first = next(line for line in lines if '"content":"' in line and '"content":""' not in line)
        running = [stack.metrics(name) for name in ("gateway-0", "gateway-1")]
        assert any("requests_in_flight 1.0" in page for page in running), first
        content(lines)


def test_a_client_that_leaves_is_heard_behind_the_port(stack: Stack) -> None:
    with stack.client.stream("POST", "chat/completions", json=ASK | {"max_tokens": 1500}) as answer:
        next(answer.iter_lines())
    stack.until(
        lambda: all(
            "requests_in_flight 0.0" in stack.metrics(name) for name in ("gateway-0", "gateway-1")
        )
    )


def test_receipts_and_traces_are_found_whichever_gateway_keeps_them(stack: Stack) -> None:
    """Through the port, of requests that each gateway has answered; what nobody has is a 404."""
    for name in ("gateway-0", "gateway-1"):
        body = ASK | {"max_tokens": 2, "stream": False}
        answer = stack.client.post(f"{stack.url(name)}/v1/chat/completions", json=body)
        receipt = answer.headers["x-headgate-receipt"]
        pages = (("/v1/receipts", {}), ("/admin/receipts", STEERS), ("/admin/traces", STEERS))
        for page, key in pages:
            path = f"{page}/{receipt}"
            for _ in range(2):
                found = stack.client.get(str(stack.client.base_url.join(path)), headers=key)
                assert found.status_code == 200, f"{name} {path} {found.text}"
    nobody = stack.client.get(str(stack.client.base_url.join("/v1/receipts/rcpt_0")))
    assert nobody.status_code == 404
    assert nobody.json()["error"]["code"] == "receipt_not_found"


def test_gateways_and_runtimes_send_traces_where_the_stack_says(stack: Stack) -> None:
    body = ASK | {"max_tokens": 4, "stream": False}
    assert stack.client.post("chat/completions", json=body).status_code == 200
    stack.until(lambda: Collector.services == {"headgate-gateway", "headgate-runtime"})


def test_a_pass_that_was_made_elsewhere_is_on_in_every_runtime(stack: Stack) -> None:
    """docs/stack.md, "Bring a verdict": what is bound are bytes, not where they lie; gateways tell
    what each runtime says of it."""
    for gateway in ("gateway-0", "gateway-1"):
        assert stack.optimization(gateway, "steps") == ["on True", "on True"]


def test_a_pass_on_the_gateways_is_on_once_they_read_their_policy_again(
    stack: Stack, tmp_path: Path
) -> None:
    """Both of them, of one verdict, in the ledger that runtimes read, too."""
    names = ("gateway-0", "gateway-1")
    assert [stack.optimization(name, "fewer") for name in names] == [["off False"]] * 2
    gateways = stack.processes_of("gateway")
    policy = next(Path(word) for word in gateways[0].cmdline() if word.endswith("stack.yaml"))
    verdict = verdict_on(proposed(tmp_path, "fewer", policy), at=time.time())
    Ledger.open(stack.ledger).record_verdict(verdict)
    for gateway in gateways:
        gateway.send_signal(signal.SIGHUP)
    stack.until(
        lambda: [stack.optimization(name, "fewer") for name in names] == [["on True"]] * 2
    )  # fmt: skip


Series = dict[str, list[tuple[dict[str, str], float]]]  # by name: labels and value


def scraped(stack: Stack) -> Series:
    """What Prometheus would have of this stack."""
    seen: Series = {"up": [({"job": "gateway", "instance": "gateway-0"}, 1.0)]}
    for name in ("gateway-0", "gateway-1", "runtime-0", "runtime-1"):
        key = WORKER_KEY if name.startswith("runtime") else STEERS["authorization"]
        page = stack.client.get(f"{stack.url(name)}/metrics", headers={"authorization": key})
        for family in text_string_to_metric_families(page.text):
            for one in family.samples:
                # A gateway of several processes says `process` itself, a board asks for both.
                labels = {"process": ""} | one.labels | {"instance": name, "job": name[:-2]}
                seen.setdefault(one.name, []).append((labels, one.value))
    return seen


@pytest.fixture(scope="module")
def busy(stack: Stack) -> Series:
    """A scrape of a stack on which everything has moved that has metrics: answers were guessed at
    and late, a conversation was trimmed, a verdict stands, a rollout is under way."""
    rollout = {
        "id": "r1", "name": "trim", "patch": {"gateway.trim.budget_tokens": 4096},
        "share": 0.1, "shadow": 0.0, "lease_s": 60, "roots": ROOTS,
    }  # fmt: skip
    said = [
        {"role": role, "content": f"{number}. " + "one, two, three, four, five. " * 5}
        for number in range(40)
        for role in ("user", "assistant")
    ]
    more = {"max_tokens": 100, "stream_options": {"include_usage": True}}
    for name in ("gateway-0", "gateway-1"):
        for tier, before in (("standard", []), ("hopeless", said)):
            with stack.client.stream(
                "POST", f"{stack.url(name)}/v1/chat/completions",
                json=ASK | more | {"messages": [*before, *ASK["messages"]]},
                headers={"x-headgate-tier": tier},
            ) as stream:  # fmt: skip
                content(stream.iter_lines())
        url = f"{stack.url(name)}/admin/variants/candidate"
        answer = stack.client.put(url, json=rollout, headers=STEERS)
        assert answer.status_code == 200, answer.text
    return scraped(stack)


# What would be there, with nothing in it, of a stack in which it did not work.
MOVED: tuple[tuple[str, dict[str, str]], ...] = (
    ("headgate_drafts_total", {}),
    ("headgate_draft_tokens_total", {"proposer": "ngram", "fate": "accepted"}),
    ("headgate_draft_tokens_total", {"proposer": "ngram", "fate": "rejected"}),
    ("headgate_draft_seconds_total", {}),
    ("headgate_accepted_draft_tokens_at_total", {"position": "0"}),
    ("vllm:spec_decode_num_accepted_tokens_total", {}),
    ("headgate_token_ledger_tokens_total", {"job": "gateway", "stage": "accepted"}),
    ("headgate_token_ledger_tokens_total", {"job": "runtime", "stage": "drafted"}),
    ("headgate_gateway_trimmed_tokens_total", {"what": "removed"}),
    ("headgate_token_ledger_tokens_total", {"job": "gateway", "stage": "trimmed"}),
    ("headgate_gateway_goodput_requests_total", {"tier": "hopeless", "met": "false"}),
    ("headgate_rollout_share", {"name": "trim"}),
    ("headgate_rollout_state", {"name": "trim", "state": "live"}),
    ("headgate_optimization_state", {"name": "response-cache", "state": "stale"}),
    ("headgate_verdict_age_seconds", {"name": "response-cache"}),
    ("headgate_verdict_valid_seconds", {"name": "response-cache"}),
)


def test_every_metric_of_a_dashboard_or_an_alert_is_there(busy: Series) -> None:
    """Name, labels, and values that are asked for; what rules record is theirs."""
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    asked += [rule["expr"] for rule in rules()]
    asked += [f"sum by ({label}) ({metric})" for _, label, metric in variables()]
    lost = [
        str(one)
        for one in {one for expr in asked for one in wanted(expr)}
        if not one.name.startswith("headgate:")
        and not any(one.fits(labels) for labels, _ in busy.get(one.name, ()))
    ]
    assert not lost, "\n".join(sorted(lost))


def test_what_has_happened_has_moved_its_metric(busy: Series) -> None:
    """A counter that is there and stays at 0 draws an empty panel, too."""
    still = [
        (name, labels)
        for name, labels in MOVED
        if not any(value > 0 and labels.items() <= one.items() for one, value in busy.get(name, ()))
    ]
    assert not still


def test_a_verdict_is_as_old_as_its_ledger_says(busy: Series) -> None:
    for name, near in (("age", 3600.0), ("valid", 86400.0)):
        told = busy[f"headgate_verdict_{name}_seconds"]
        ages = [value for labels, value in told if labels["name"] == "response-cache"]
        assert len(ages) == 2
        assert all(abs(value - near) < 2 * LIMIT_S for value in ages)


def test_the_tour_works_line_by_line(stack: Stack) -> None:
    """docs/stack.md as a reader types it, on this stack's port; what needs containers is parsed."""
    port = str(stack.client.base_url.port)
    environ = os.environ | {
        "HEADGATE_API_KEY": KEY, "HEADGATE_ADMIN_KEY": KEYS["HEADGATE_ADMIN_KEY"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    ran = 0
    for step in steps(ROOT / "docs" / "stack.md"):
        if not step.runs:
            assert complaint(step.command) is None, step.place
            continue
        command = step.command.replace(":8080", f":{port}")
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{step.place}  {step.command}\n{done.stdout}{done.stderr}"
        assert not missing(step, done.stdout), f"{step.place}  {done.stdout}"
        ran += 1
    assert ran >= 4


def test_a_killed_gateway_costs_no_request_that_comes_after(stack: Stack) -> None:
    """The other one answers until it is back."""
    short = ASK | {"max_tokens": 4, "stream": False}
    victim = stack.process_of("gateway")
    victim.kill()
    victim.wait()
    for _ in range(6):
        assert stack.client.post("chat/completions", json=short).status_code == 200
    stack.until(lambda: stack.well("gateway-0") and stack.well("gateway-1"))


def test_a_stream_outlives_its_killed_runtime(stack: Stack) -> None:
    """The other one goes on with it, token for token."""
    with stack.client.stream("POST", "chat/completions", json=ASK) as answer:
        whole = content(answer.iter_lines())
    with stack.client.stream("POST", "chat/completions", json=ASK) as answer:
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(12)]
        stack.runtime_at_work().kill()
        again = content(iter([*first, *lines]))
    assert again == whole


def test_a_redis_that_dies_is_missed_by_nobody(stack: Stack) -> None:
    children = psutil.Process(stack.process.pid).children()
    next(one for one in children if one.name() == "redis-server").kill()
    assert stack.client.post("chat/completions", json=ASK | {"max_tokens": 4}).status_code == 200


def test_it_ends_in_order_and_leaves_nothing(stack: Stack) -> None:
    """A running answer is given to its end; then no process and no folder is left."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    folder = Path(stack.process_of("-db").cmdline()[-1]).parents[3]
    assert folder.name.startswith("hg-")
    url, key = stack.client.base_url, stack.client.headers["authorization"]
    stack.client.close()  # an idle connection is waited for
    with httpx.stream(
        "POST", f"{url}chat/completions", json=ASK, headers={"authorization": key}, timeout=LIMIT_S
    ) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        stack.process.send_signal(signal.SIGINT)
        assert content(iter([first, *lines]))
    assert stack.process.wait(LIMIT_S) == 0, stack.log.read_text()[-3000:]
    assert not [one for one in children if one.is_running()]
    assert not folder.exists()
