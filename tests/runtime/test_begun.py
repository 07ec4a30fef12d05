"""An answer that another worker began: it goes on by tokens, as if it had been said here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_server import CHAT, HELLO, World, serving
from tests.runtime.tiny_models import FAMILIES, write_model

TELL = {"x-headgate-token-ids": "1"}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "cut tails": {"temperature": 0.9, "seed": 3, "top_k": 20, "top_p": 0.8},
    "penalties": {
        "temperature": 1.0,
        "seed": 5,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


def streamed(
    world: World, path: str, body: dict[str, Any]
) -> tuple[list[tuple[list[int], str]], Any, str | None]:
    """Token ids and text of each event, the usage, and why it ended."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = world.client.post(path, json=body | options, headers=TELL)
    assert response.status_code == 200, response.text
    events: list[tuple[list[int], str]] = []
    ids: list[int] = []
    usage = reason = None
    for block in response.text.split("\n\n"):
        if block.startswith(": token-ids "):
            ids = [int(one) for one in block.removeprefix(": token-ids ").split(",")]
        elif block.startswith("data: {"):
            chunk = json.loads(block.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content")
                events.append((ids, text or ""))
                reason = choice["finish_reason"] or reason
                ids = []
    return events, usage, reason


@pytest.mark.parametrize("named", list(ASKED))
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_an_answer_goes_on_token_by_token_from_wherever_it_was_cut(
    folder: Path, path: str, named: str
) -> None:
    """Cut behind any event: the rest is the rest of the uninterrupted answer, drawn by the same
    numbers and penalized alike; usage counts the prompt and the answer once."""
    body = HELLO | ASKED[named] | {"max_tokens": 24}
    if path != CHAT:
        body["prompt"] = "once upon"
        del body["messages"]
    with serving(folder) as world:
        events, usage, reason = streamed(world, path, body)
        assert sum(len(ids) for ids, _ in events) == usage["completion_tokens"] == 24
        for cut in range(1, len(events), 5):
            begun = [token for ids, _ in events[:cut] for token in ids]
            rest, again, ended = streamed(world, path, body | {"begun_token_ids": begun})
            assert [one for one in rest if one[0]] == [one for one in events[cut:] if one[0]]
            assert ended == reason
            for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert again[name] == usage[name]
            assert again["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_a_stop_string_that_had_begun_still_stops(folder: Path) -> None:
    """What was held back at the cut is held back again."""
    with serving(folder) as world:
        body = HELLO | {"max_tokens": 24}
        events, _, _ = streamed(world, CHAT, body)
        whole = "".join(text for _, text in events)
        stop = whole[len(whole) // 2 :][:4]
        body |= {"stop": stop}
        stopped, _, reason = streamed(world, CHAT, body)
        assert reason == "stop"
        cut = len(stopped) // 2
        begun = [token for ids, _ in stopped[:cut] for token in ids]
        rest, _, ended = streamed(world, CHAT, body | {"begun_token_ids": begun})
        said = "".join(text for _, text in stopped[:cut]) + "".join(text for _, text in rest)
        assert (said, ended) == ("".join(text for _, text in stopped), "stop")


def test_tokens_are_told_only_to_whoever_asks(folder: Path) -> None:
    """Without the header a stream has no comment."""
    with serving(folder) as world:
        assert "token-ids" not in world.post(stream=True).text


@pytest.mark.parametrize(
    "change",
    [
        {"begun_token_ids": [10**6]},
        {"begun_token_ids": [1, 2, 3, 4]},
        {"begun_token_ids": [1], "n": 2},
        {"begun_token_ids": [1], "logprobs": True},
        {"begun_token_ids": ["1"]},
    ],
)
def test_what_cannot_go_on_is_refused(folder: Path, change: dict[str, Any]) -> None:
    """Unknown tokens, no room behind them, more than one answer, numbers of what is not here."""
    with serving(folder) as world:
        response = world.post(**change)
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("begun_token_ids")
