"""`headgate requests`: what is asked of a gateway, and what of its answer is shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from click.testing import CliRunner, Result

from command.explain import explain
from command.requests import came, requests, rows
from command.screen import columns, cut, plain, wide
from command.trace import trace
from tests.cli.test_trace import answering

AT = 1_795_000_000.0
REQUEST = {
    "id": "req_1", "at": AT, "tenant": "acme", "model": "m", "tier": "standard", "arm": "",
    "status": 200, "error": "", "outcome": "ok", "attempts": 1, "e2e_s": 1.0, "ttft_s": 0.25,
    "prompt_tokens": 1500, "cached_tokens": 1024, "answer_tokens": 16,
}  # fmt: skip
ADMIN, CLIENT = "HEADGATE_ADMIN_KEY", "HEADGATE_API_KEY"


def told(*some: Any, **more: Any) -> bytes:
    whole = {"requests": some, "matched": len(some), "processes": {"asked": 2, "of": 2}}
    return json.dumps(whole | more).encode()


def run(*words: str) -> Result:
    return CliRunner().invoke(requests, words)


def test_a_request_is_a_line_with_how_it_ended() -> None:
    head, *lines = rows(
        [
            REQUEST,
            REQUEST | {"outcome": "failed", "status": 502, "error": "upstream_cut", "attempts": 3},
            REQUEST | {"outcome": "late", "arm": "candidate", "ttft_s": None},
            REQUEST | dict.fromkeys(("prompt_tokens", "cached_tokens", "answer_tokens")),
            REQUEST | {"outcome": "refused", "status": 400, "error": "400"},
        ],
        AT,
    )
    assert head.split() == [
        "came", "request", "tenant", "tier", "model", "tokens", "cached", "first", "token", "whole",
        "ended",
    ]  # fmt: skip
    whole = "acme standard m 1,500 + 16 68% 250.00 ms 1,000.00 ms ok"
    assert lines[0].split()[1:] == ["req_1", *whole.split()]
    assert lines[1].endswith("failed 502 upstream_cut, 3 tries")
    assert lines[2].endswith("late 200, candidate")
    assert lines[3].split()[2:6] == ["acme", "standard", "m", "250.00"]
    assert lines[4].endswith("refused 400")  # and not 400 400
    assert "acme" not in " ".join(rows([REQUEST | {"tenant": ""}], AT))
    assert len(rows([], AT)) == 1


def test_the_time_of_another_day_has_its_date() -> None:
    assert came(AT, AT + 1) == time.strftime("%H:%M:%S", time.localtime(AT))
    assert came(AT, AT + 9e5).startswith("2026-1")


def test_a_terminal_obeys_nothing_that_a_client_has_written() -> None:
    (_, line) = rows([REQUEST | {"model": "m" * 300, "error": "e" * 300, "outcome": "failed"}], AT)
    assert len(line) < 240
    (_, line) = rows([REQUEST | {"model": "m\x1b[2J\x1b]0;mine\x07\n\x9bH"}], AT)
    assert "m?[2J?]0;mine???H" in plain(line)
    assert plain("· █ ▐ Größe") == "· █ ▐ Größe"


def test_columns_stand_in_line_whatever_letters_names_have() -> None:
    """The bug: letters of East Asia take two columns of a terminal, and were counted as one."""
    names = ["模型-七", "m", "🦙", "e\u0301", "Größe"]
    lines = columns([(name, "|") for name in names], "")
    assert {wide(line) for line in lines} == {wide("模型-七") + 3}
    for name in ("模" * 80, "a" * 80, "a" * 45 + "模型"):
        assert wide(cut(name)) in (45, 46)
        assert cut(name).endswith("…")
    assert cut("模" * 23) == "模" * 23


def test_what_is_looked_for_is_asked_of_the_gateway() -> None:
    """`latest` and `slow` of `headgate trace` are two such questions."""
    heard: list[Any] = []
    with answering(told(REQUEST), heard=heard) as url:
        done = run(
            "--outcome", "missed", "--tier", "batch", "--text", "a b&c", "--took-over", "2.5",
            "--slowest", "--limit", "7", "--url", url,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert heard[-1][0] == (
            "/admin/requests?outcome=missed&tier=batch&text=a+b%26c&over_s=2.5&clock=whole"
            "&order=slowest&limit=7"
        )
        assert run("--first-token-over", "1", "--url", url).exit_code == 0
        assert heard[-1][0] == "/admin/requests?over_s=1.0&limit=20"
        assert trace("slow", url, as_json=False) == trace("latest", url, as_json=True) == 0
        assert [path for path, _ in heard[-2:]] == [
            "/admin/requests?limit=20&order=slowest&clock=whole", "/admin/requests?limit=20",
        ]  # fmt: skip
        assert run("--first-token-over", "1", "--took-over", "1", "--url", url).exit_code == 2
        assert run("--outcome", "lost", "--url", url).exit_code == 2


def test_a_list_says_of_what_it_is_not() -> None:
    """Beside what was asked for: on the other stream."""
    with answering(told(REQUEST, matched=40, processes={"asked": 1, "of": 2})) as url:
        done = run("--url", url)
    assert (done.exit_code, done.stdout.count("\n")) == (0, 2)
    assert done.stderr.splitlines() == [
        "1 of 40 that fit; --limit shows more",
        "of 1 of 2 gateway processes; --url asks another at its own address",
    ]


FOREIGN = [
    b"{}", b"[]", b"7", b"null", b'"text"', b"not json", b"\xff\xfe", b"[" * 9000,
    b'{"data": [], "object": "list"}', told(7), told({}), told(processes=[2]), told(matched="all"),
    told(REQUEST | {"at": "now"}), told(REQUEST | {"e2e_s": float("inf")}),
    told(REQUEST | {"prompt_tokens": [1]}), told(REQUEST | {"at": 10**400}),
]  # fmt: skip


def test_another_server_at_the_url_is_told_in_a_line() -> None:
    for body in FOREIGN:
        with answering(body) as url:
            done = run("--url", url)
        assert (done.exit_code, done.stdout) == (1, ""), body
        assert done.stderr.count("\n") == 1
        assert f"{url}/admin/requests" in done.stderr


def test_an_operators_key_is_sent_and_a_refusal_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be sent is wrong usage, as an address that is none."""
    for name in (ADMIN, CLIENT):
        monkeypatch.delenv(name, raising=False)
    error = json.dumps({"error": {"message": "no"}}).encode()
    heard: list[Any] = []
    assert run("--url", "http://?").exit_code == 2
    with answering(error, b"HTTP/1.1 401 Unauthorized", heard) as url:
        done = run("--url", url)
        assert done.exit_code == 2
        assert (
            "answered 401: no (HEADGATE_ADMIN_KEY is sent along), which is not set" in done.stderr
        )
        monkeypatch.setenv(CLIENT, "hg-client")
        assert "(HEADGATE_API_KEY is sent along)\n" in run("--url", url).stderr
        monkeypatch.setenv(ADMIN, "hg-admin")
        done = run("--url", url)
        assert "(HEADGATE_ADMIN_KEY is sent along)\n" in done.stderr
        assert "hg-" not in done.stderr
        monkeypatch.setenv(ADMIN, "hg\nmore")
        done = run("--url", url)
        assert (done.exit_code, "hg" in done.stderr, ADMIN in done.stderr) == (2, False, True)
        assert [key for _, key in heard] == [None, "Bearer hg-client", "Bearer hg-admin"]


def test_receipts_are_read_by_an_operator_of_all_and_by_a_client_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An operator's key that this gateway does not take is no obstacle to one of its clients."""
    monkeypatch.setenv(CLIENT, "hg-client")
    heard: list[Any] = []
    with answering(b'{"data": []}', heard=heard) as url:
        assert explain("rcpt_1", url, None, as_json=True) == 0
        monkeypatch.setenv(ADMIN, "hg-admin")
        assert explain("all", url, None, as_json=True) == 0
    with answering(b"{}", b"HTTP/1.1 403 Forbidden", heard) as url:
        assert explain("req_1", url, None, as_json=True) == 2
    assert heard == [
        ("/v1/receipts/rcpt_1", "Bearer hg-client"), ("/admin/receipts", "Bearer hg-admin"),
        ("/admin/receipts/req_1", "Bearer hg-admin"), ("/v1/receipts/req_1", "Bearer hg-client"),
    ]  # fmt: skip


def test_who_looks_at_the_first_lines_alone_sees_no_traceback() -> None:
    """The bug: `headgate explain all | head` ended in one."""
    command = [sys.executable, "-m", "gateway.explain", "--json"]
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            command, input=b'{"data": []}', stdout=writes, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writes)
    assert done.stderr == b""
    assert done.returncode == -signal.SIGPIPE
