"""The gateway that traces are compared with: it answers like the other one, and notes nothing."""

from __future__ import annotations

import httpx

from benchmarks.lab.edges import OURS, listening, ours, running

ASKED = {"model": "mock", "messages": [{"role": "user", "content": "a word"}], "max_tokens": 3}


def test_the_gateway_without_traces_answers_and_tells_no_time() -> None:
    """It stands on parts of the gateway that may move: then this fails, and no measurement lies."""
    command = ours(module="benchmarks.lab.untraced")
    with listening("mock_upstream") as port, running(OURS, port, command=command) as edge:
        url = f"http://127.0.0.1:{edge.port}"
        whole = httpx.post(f"{url}/v1/chat/completions", json=ASKED)
        stream = httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"stream": True})
        traces = httpx.get(f"{url}/admin/traces").json()["traces"]
    assert whole.status_code == 200
    assert whole.headers["server-timing"] == ""
    assert whole.json()["choices"][0]["message"]["content"] == "a short answer"
    assert stream.text.endswith("data: [DONE]\n\n")
    assert traces == []
