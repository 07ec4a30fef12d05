"""`headgate chat` against a real socket: answers that stream, break off, are refused."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command.answers import Clock, visible
from command.chat import talk
from command.machine import free_ports

ROOT = Path(__file__).parents[2]


def chunk(text: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}}] if text is not None else []
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


USAGE = chunk(usage={"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10})
DONE = b"data: [DONE]\n\n"
GOOD = [chunk(""), b": keep-alive\n\n", chunk("Hel"), chunk("lo\x1b[2J"), USAGE, DONE]


class Stub:
    """A gateway that answers with these pieces, and keeps what it was asked."""

    def __init__(self, pieces: list[bytes], status: int = 200) -> None:
        self.pieces = pieces
        self.status = status
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models: dict[str, Any] = {"data": [{"id": "tiny"}]}
        self.hold = threading.Event()  # a piece of b"HOLD" waits for it


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.keys.append(self.headers["authorization"])
            self._head(200)
            self.wfile.write(json.dumps(stub.models).encode())

        def do_POST(self) -> None:
            stub.keys.append(self.headers["authorization"])
            stub.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._head(stub.status)
            for piece in stub.pieces:
                if piece == b"HOLD":
                    stub.hold.wait(20)
                    continue
                with contextlib.suppress(OSError):
                    self.wfile.write(piece)
                    self.wfile.flush()

        def _head(self, status: int) -> None:
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "3")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stub.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


def chat(
    *arguments: str, stdin: str | bytes = "", **environ: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "headgate", "chat", *arguments], cwd=ROOT,
        env=os.environ | environ, input=stdin if isinstance(stdin, bytes) else stdin.encode(),
        capture_output=True, timeout=60,
    )  # fmt: skip


def test_one_message_one_answer() -> None:
    """The answer alone is on stdout, harmless to a terminal; what it cost is on stderr."""
    stub = Stub(GOOD)
    with serving(stub) as url:
        done = chat("--url", url, "--system", "Be brief.", "hi")
    assert done.returncode == 0
    assert done.stdout == b"Hello[2J\n"
    assert re.match(rb"7 tokens . first after", done.stderr.replace("·".encode(), b"."))
    (asked,) = stub.asked
    assert asked["model"] == "tiny"
    assert asked["stream"] is True
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("told", "temperature", "sent"),
    [
        (None, None, {"temperature": 0.7}),
        ({}, 0.2, {"temperature": 0.2}),
        ({"temperature": 0}, None, {"temperature": 0}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "bias": 1, "min_p": "x"},
            None,
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        ({"top_k": 20}, 1.5, {"temperature": 1.5, "top_k": 20}),
        ([], None, {"temperature": 0.7}),
    ],
)
def test_it_samples_as_the_models_makers_do_unless_told_otherwise(
    told: Any, temperature: float | None, sent: dict[str, float]
) -> None:
    """Their generation_config.json comes with the list of models; a person's wish is above it."""
    stub = Stub(GOOD)
    stub.models = {"data": [{"id": "other"}, {"id": "tiny", "sampling": told}]}
    with serving(stub) as url:
        assert talk(url, "tiny", None, "hi", temperature) == 0
    (asked,) = stub.asked
    names = {"temperature", "top_p", "top_k", "min_p", "bias"}
    assert {name: value for name, value in asked.items() if name in names} == sent


def test_a_temperature_can_be_typed_and_a_wrong_one_is_refused() -> None:
    stub = Stub(GOOD)
    with serving(stub) as url:
        assert chat("--url", url, "--temperature", "0", "hi").returncode == 0
        assert chat("--url", url, "--temperature", "3", "hi").returncode == 2
    assert [asked["temperature"] for asked in stub.asked] == [0]


def test_a_server_that_lists_no_models_is_asked_by_name() -> None:
    stub = Stub(GOOD)
    stub.models = {"data": []}
    with serving(stub) as url:
        assert talk(url, None, None, "hi") == 1
        assert talk(url, "m", None, "hi") == 0
    assert [asked["model"] for asked in stub.asked] == ["m"]


def test_a_message_may_come_from_stdin_and_the_port_from_the_environment() -> None:
    stub = Stub(GOOD)
    with serving(stub) as url:
        port = url.rpartition(":")[2]
        done = chat("--model", "m", stdin="über\n", HEADGATE_PORT=port)
    assert done.returncode == 0, done.stderr
    assert stub.asked[0]["messages"] == [{"role": "user", "content": "über"}]
    assert stub.asked[0]["model"] == "m"


def test_nothing_on_stdin_is_told() -> None:
    done = chat()
    assert (done.returncode, done.stderr) == (2, b"stdin is empty: give a MESSAGE\n")
    done = chat(stdin=b"\xff\xfe")
    assert (done.returncode, done.stderr) == (2, b"stdin is not UTF-8 text\n")


def test_no_server_says_how_to_start_one() -> None:
    (port,) = free_ports(1)
    done = chat("--url", f"http://127.0.0.1:{port}/v1/", "hi")
    assert done.returncode == 1
    told = f"nothing answers at http://127.0.0.1:{port}: start it with headgate serve\n"
    assert done.stderr.decode() == told


@pytest.mark.parametrize(
    ("url", "told"),
    [("http://[", "is not a URL"), ("nonsense url", "URL"), ("ftp://127.0.0.1", "URL")],
)
def test_a_url_that_is_none_is_told(
    url: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(url, None, None, "hi") == 2
    assert told in capsys.readouterr().err


def test_the_key_of_the_environment_is_sent_along() -> None:
    """A gateway with tenants, as the stack's, could not be talked to at all."""
    stub = Stub(GOOD)
    with serving(stub) as url:
        assert chat("--url", url, "hi", HEADGATE_API_KEY="hg-mine ").returncode == 0
        assert stub.keys == ["Bearer hg-mine"] * 2
        wrong = chat("--url", url, "hi", HEADGATE_API_KEY="hg\nmore")
        assert (wrong.returncode, len(stub.keys)) == (2, 2)
        assert b"HEADGATE_API_KEY" in wrong.stderr
        assert b"hg" not in wrong.stderr
    body = json.dumps({"error": {"message": "no API key came"}}).encode()
    with serving(Stub([body], status=401)) as url:
        done = chat("--url", url, "hi")
    assert done.stderr == b"HTTP 401: no API key came (HEADGATE_API_KEY is sent along)\n"


def test_a_port_that_is_none_is_wrong_usage() -> None:
    for junk in ("-1", "0"):
        done = chat("hi", HEADGATE_PORT=junk)
        assert done.returncode == 2
        assert b"HEADGATE_PORT" in done.stderr


def test_a_refusal_is_told_with_its_advice() -> None:
    body = json.dumps({"error": {"message": "too many requests", "type": "x"}}).encode()
    with serving(Stub([body], status=429)) as url:
        done = chat("--url", url, "hi")
    assert done.returncode == 1
    assert done.stderr == b"HTTP 429: too many requests (try again in 3 s)\n"


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([chunk("Hel"), b'data: {"error": {"message": "replica died"}}\n\n'], "replica died"),
        ([chunk("Hel")], "the stream ended before the answer did"),
        ([b"data: [1]\n\n"], "not a JSON object"),
        ([b"data: {oops\n\n"], "not a JSON object"),
        ([chunk(choices=["x", {"delta": 5}, {"delta": {"content": 7}}])], "ended before"),
        ([chunk(choices=5)], "ended before"),
    ],
)
def test_an_answer_that_breaks_off_is_told(
    pieces: list[bytes], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Stub(pieces)) as url:
        assert talk(url, "tiny", None, "hi") == 1
    assert told in capsys.readouterr().err


class Terminal:
    """`headgate chat` in a pseudo-terminal."""

    def __init__(self, url: str, folder: Path) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headgate", "chat", "--url", url], cwd=ROOT,
            env=os.environ | {"XDG_STATE_HOME": str(folder), "TERM": "dumb"},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self.watchdog = threading.Timer(90, self.process.kill)  # far beyond a busy machine
        self.watchdog.start()

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, text: str) -> None:
        """Reads on until this is shown; forgets what came before."""
        while text not in self.shown:
            try:
                self.shown += os.read(self.ours, 4096).decode("utf-8", "replace")
            except OSError:  # EIO: the other side is closed
                raise AssertionError(f"{text!r} never came: {self.shown!r}") from None
        self.shown = self.shown.partition(text)[2]

    def end(self) -> int:
        self.watchdog.cancel()
        code = self.process.wait(60)
        os.close(self.ours)
        return code


def test_a_chat_remembers_resets_and_survives_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C in an answer stops the answer; what was said of it stays in the talk."""
    stub = Stub(GOOD)
    with serving(stub) as url:
        terminal = Terminal(url, tmp_path)
        terminal.until("> ")
        terminal.type("first\n")
        terminal.until("7 tokens")
        stub.pieces = [chunk("half"), b"HOLD", DONE]
        terminal.type("second\n")
        terminal.until("half")
        terminal.type("\x03")
        terminal.until("stopped")
        stub.pieces = GOOD
        terminal.type("third\n")
        terminal.until("7 tokens")
        contents = [message["content"] for message in stub.asked[-1]["messages"]]
        assert contents == ["first", "Hello\x1b[2J", "second", "half", "third"]
        terminal.type("/system Be kind.\n")
        terminal.until("system prompt: Be kind.")
        terminal.type("/nonsense\n")
        terminal.until("there is no command /nonsense")
        terminal.type("fourth\n")
        terminal.until("7 tokens")
        contents = [message["content"] for message in stub.asked[-1]["messages"]]
        assert contents == ["Be kind.", "fourth"]
        stub.status, stub.pieces = 500, [b'{"error": {"message": "broken"}}']
        terminal.type("fifth\n")
        terminal.until("HTTP 500: broken")
        terminal.type("/quit\n")
        assert terminal.end() == 0
    assert "fifth" in (tmp_path / "headgate" / "chat_history").read_text()


def test_what_an_answer_cost_is_one_line() -> None:
    clock = Clock(first_s=0.5, last_s=2.5, pieces=3, usage={"completion_tokens": 21})
    assert clock.line() == "21 tokens · first after 0.50 s · 10.0 tokens/s"
    assert Clock(first_s=0.5, last_s=0.5, pieces=1).line() == "1 token · first after 0.50 s"
    assert Clock().line() == "0 tokens"


def test_control_characters_never_reach_the_terminal() -> None:
    assert visible("a\x1b]0;x\x07\tb\nc\r\u202ed") == "a]0;x\tb\ncd"
