"""What commands say where a gateway refuses, is not there, or tells what a terminal would obey."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from command.answers import AnswerError
from command.asking import Refused, asked
from command.machine import free_ports
from command.replicas import replicas
from tests.cli.test_trace import answering

KEY = "HEADGATE_ADMIN_KEY"
REPLICA = {
    "url": "http://10.0.0.7:8000", "healthy": True, "draining": True, "in_flight": 0,
    "drained": {"why": "new\ndriver \x1b[2J", "at": 1.0},
}  # fmt: skip
TOLD = json.dumps({"replicas": [REPLICA], "processes": {"asked": 1, "of": 1}}).encode()


def run(*words: str) -> Result:
    return CliRunner().invoke(replicas, words)


def test_what_others_wrote_takes_no_line_and_moves_no_cursor() -> None:
    with answering(TOLD) as url:
        done = run("list", "--url", url)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    assert "new?driver ?[2J" in done.stdout


def test_where_nobody_listens_it_is_said_what_to_do() -> None:
    done = run("list", "--url", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "headgate serve" in done.stderr


def test_a_key_that_no_header_takes_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("secret\nmore", "secrét"):
        monkeypatch.setenv(KEY, wrong)
        with answering(TOLD) as url:
            done = run("list", "--url", url)
        assert done.exit_code == 2
        assert KEY in done.stderr
        assert "secr" not in done.stderr


def test_a_gateway_whose_operators_have_the_one_key_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[tuple[str, str | None]] = []
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv("HEADGATE_API_KEY", "hg-one")
    with answering(TOLD, heard=heard) as url:
        assert run("list", "--url", url).exit_code == 0
        monkeypatch.setenv(KEY, " ")
        assert run("list", "--url", url).exit_code == 0
        monkeypatch.setenv(KEY, "hg-operator")
        assert run("list", "--url", url).exit_code == 0
    assert [key for _, key in heard] == ["Bearer hg-one"] * 2 + ["Bearer hg-operator"]


def test_a_wait_that_is_no_number_is_refused_before_anything_is_drained() -> None:
    for wrong in ("nan", "inf", "-1"):
        done = run("drain", REPLICA["url"], "--wait", wrong, "--url", "http://127.0.0.1:1")
        assert done.exit_code == 2, wrong
        assert "--wait" in done.stderr


def test_errors_are_told_by_their_message() -> None:
    error = json.dumps({"error": {"message": "there is no such replica"}}).encode()
    with (
        answering(error, status=b"HTTP/1.1 404 Not Found") as url,
        pytest.raises(Refused, match="answered 404: there is no such replica"),
    ):
        asked(url, KEY)
    with answering(b"", status=b"SSH-2.0-OpenSSH_9.2") as url, pytest.raises(AnswerError):
        asked(url, KEY)


def test_help_says_what_forgets_a_drain() -> None:
    """The bug: "until it is resumed" and no more; one process without a store forgets it."""
    assert "single process without a store forgets it" in " ".join(run("--help").output.split())
