"""What a request may ask of the scheduler, over a real socket: classes, targets, deadline, salt."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime.orders import service_of
from runtime.wire import parse_chat
from tests.runtime.test_server import CHAT, HELLO, World, serving
from tests.runtime.tiny_models import FAMILIES, write_model

LONG = [{"role": "user", "content": "x" * 60}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


def cached(world: World, **change: Any) -> int:
    usage = world.post(messages=LONG, **change).json()["usage"]
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= found < usage["prompt_tokens"]
    return found


def test_usage_says_how_much_of_a_prompt_was_found(folder: Path) -> None:
    """Nothing the first time, every full block the second; a reset starts anew; a salt is apart."""
    with serving(folder) as world:
        assert cached(world) == 0
        assert cached(world) == 48
        assert cached(world, cache_salt="tenant") == 0
        assert cached(world, cache_salt="tenant") == 48
        assert world.client.post("/reset_prefix_cache").status_code == 200
        assert cached(world) == 0


def test_choices_of_one_request_share_their_prompt(folder: Path) -> None:
    """The prompt of n choices is computed once; the worker counts what the others found, and usage,
    which counts the prompt once, says that it was not there before."""
    with serving(folder) as world:
        body = HELLO | {"messages": LONG, "n": 3, "temperature": 1.0, "seed": 7}
        alone = world.client.post(CHAT, json=body | {"n": 1, "cache_salt": "other"}).json()
        answer = world.client.post(CHAT, json=body).json()
        assert len(answer["choices"]) == 3
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] > 48
        assert answer["usage"]["completion_tokens"] == 3 * alone["usage"]["completion_tokens"]
        assert world.health()["cached_tokens"] == 2 * 48


def test_a_request_past_its_deadline_is_504_and_leaves_nothing(folder: Path) -> None:
    """Whether it waits or runs: the client hears why, and its blocks are free."""
    with serving(folder, max_sequences=1) as world, ThreadPoolExecutor(2) as pool:
        world.model.gate.clear()
        running = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        headers = {"x-slo-deadline-ms": "1"}
        late = pool.submit(world.client.post, CHAT, json=HELLO, headers=headers)
        world.until(lambda: world.health()["waiting"] == 1)
        world.model.gate.set()
        assert running.result().status_code == 200
        refused = late.result()
        assert refused.status_code == 504
        assert refused.json()["error"]["code"] == "deadline_exceeded"
        world.until(world.idle)


def test_an_urgent_request_overtakes_those_that_wait(folder: Path) -> None:
    """With one place, the lower priority number is served first, whoever came first."""
    with serving(folder, max_sequences=1) as world, ThreadPoolExecutor(3) as pool:
        ends: list[str] = []

        def ask(name: str, priority: int) -> None:
            assert world.post(priority=priority).status_code == 200
            ends.append(name)

        world.model.gate.clear()
        first = pool.submit(ask, "running", 0)
        world.until(lambda: world.health()["running"] == 1)
        usual = pool.submit(ask, "usual", 0)
        world.until(lambda: world.health()["waiting"] == 1)
        urgent = pool.submit(ask, "urgent", -1)
        world.until(lambda: world.health()["waiting"] == 2)
        world.model.gate.set()
        for one in (first, usual, urgent):
            one.result()
        assert ends.index("urgent") < ends.index("usual")


@pytest.mark.parametrize(
    ("change", "headers", "param"),
    [
        ({"priority": 1.5}, {}, "priority"),
        ({"priority": 10**6}, {}, "priority"),
        ({"cache_salt": ""}, {}, "cache_salt"),
        ({"cache_salt": "x" * 1000}, {}, "cache_salt"),
        ({"cache_salt": 3}, {}, "cache_salt"),
        ({}, {"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms"),
        ({}, {"x-slo-tpot-ms": "-1"}, "x-slo-tpot-ms"),
        ({}, {"x-slo-tpot-ms": "nan"}, "x-slo-tpot-ms"),
        ({}, {"x-slo-deadline-ms": "inf"}, "x-slo-deadline-ms"),
        ({}, {"x-slo-deadline-ms": "0"}, "x-slo-deadline-ms"),
        ({}, {"x-headgate-priority": "high"}, "x-headgate-priority"),
        ({}, {"x-headgate-priority": "1001"}, "x-headgate-priority"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    folder: Path, change: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    """A wrong class, target, deadline or salt is a 400 that names it."""
    with serving(folder) as world:
        answer = world.client.post(CHAT, json=HELLO | change, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_the_gateways_word_goes_before_the_bodys_priority() -> None:
    """A tenant may write any `priority`; how urgent its request is, the gateway says."""
    asked = parse_chat(json.dumps(HELLO | {"priority": -9}).encode())
    assert service_of(asked, []).priority == -9
    assert service_of(asked, [(b"x-headgate-priority", b"3")]).priority == 3
