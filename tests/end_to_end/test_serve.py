"""`headgate serve` as a person runs it: ready, a question answered, Ctrl-C, nothing left."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from command.serve import curl
from tests.end_to_end.stack import ENVIRONMENT, ROOT, START_S, STOP_S, Stack, events

PRINTED_ANSWER = "Order JR-9265 parcel: 4659-1394."


def asked_by(command: str) -> tuple[str, str]:
    """URL and body of a curl command as the shell would hand them over."""
    words = shlex.split(command)
    assert words[0] == "curl"
    return words[2], words[words.index("-d") + 1]


@contextmanager
def served(*policy: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`headgate serve` on a free port, with what it printed up to its last line of readiness."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "headgate", "serve", *policy],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | ENVIRONMENT | {"HEADGATE_PORT": "0"},
        text=True,
    )
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    lines: list[str] = []
    assert process.stdout
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if "Ctrl-C here" in line:
                break
        yield process, lines
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_serve_gets_ready_answers_the_printed_question_and_drains() -> None:
    """The printed curl works as pasted; Ctrl-C lets the running answer finish and leaves nobody."""
    with served() as (process, lines):
        printed = "\n".join(lines)
        assert re.search(r"ready in \d+\.\d s", printed), printed
        url, body = asked_by(printed[printed.index("curl ") : printed.index("\n\nor talk")])
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        answer = events(httpx.post(url, content=body, timeout=60).content)
        assert answer[-1] == "[DONE]"
        assert answer[-2]["choices"][0]["finish_reason"] in ("stop", "length")

        long = json.loads(body) | {"max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", url, json=long, timeout=60) as response:
            chunks = response.iter_bytes()
            got = next(chunks)
            process.send_signal(signal.SIGINT)
            got += b"".join(chunks)
        finished = events(got)
        assert finished[-1] == "[DONE]"
        assert finished[-2]["choices"][0]["finish_reason"] == "length"
        assert process.stdout
        rest = process.stdout.read()
        assert process.wait(STOP_S) == 0, rest
        assert "Traceback" not in rest
        _, alive = psutil.wait_procs(children, timeout=STOP_S)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_the_printed_question_is_answered_right(stack: Stack) -> None:
    """The first thing that anybody asks has one right answer, greedy and with any seed."""
    url, body = asked_by("\n".join(curl(stack.gateway.url, "pocket", keys=False)))
    question = json.loads(body) | {"stream": False}
    for change in ({"temperature": 0}, *({"seed": seed} for seed in range(5))):
        answer = stack.client.post(url, json=question | change).json()
        assert answer["choices"][0]["message"]["content"] == PRINTED_ANSWER
        assert answer["choices"][0]["finish_reason"] == "stop"


# ---- what keeps it from starting ----------------------------------------------------------------

POLICY = "version: 1\nruntime:\n  model: {model}\n"


def refused(folder: Path, policy: str, *, port: int = 0) -> tuple[int, str]:
    """Exit code and output of a `headgate serve` that must not start."""
    file = folder / "policy.yaml"
    file.write_text(policy)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "headgate", "serve", str(file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | ENVIRONMENT | {"HEADGATE_PORT": str(port)},
        text=True,
        timeout=START_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_typo_is_pointed_at_with_a_suggestion(tmp_path: Path) -> None:
    """File, line, column, the field, and what was probably meant."""
    code, said = refused(tmp_path, "version: 1\nruntime:\n  modle: pocket\n")
    assert code == 2
    assert re.search(r"policy\.yaml:3:3 .*modle.*model", said), said


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ("no-such-folder",)),
        ((), ("config.json",)),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), ("safetensors", "pickle")),
    ],
    ids=["missing", "empty", "pickle only"],
)
def test_a_folder_that_cannot_be_served_is_named(
    tmp_path: Path, files: tuple[str, ...] | None, words: tuple[str, ...]
) -> None:
    """Missing, empty, or with weights that could run code: told before anything starts."""
    name = "./no-such-folder"
    if files is not None:
        name = "./model"
        (tmp_path / "model").mkdir()
        for file in files:
            (tmp_path / "model" / file).write_text("{}")
    code, said = refused(tmp_path, POLICY.format(model=name))
    assert code == 2, said
    assert re.search(r"policy\.yaml:3:\d+ ", said), said
    assert all(word in said for word in words), said


def test_a_taken_port_is_told_with_the_way_out(stack: Stack, tmp_path: Path) -> None:
    """Who holds it, where that can be seen, and the command that takes another."""
    code, said = refused(tmp_path, POLICY.format(model="pocket"), port=stack.port)
    assert code == 1, said
    assert str(stack.port) in said
    assert "HEADGATE_PORT=" in said
    assert stack.works()


def test_a_worker_whose_port_is_taken_ends_with_the_reason(stack: Stack, tmp_path: Path) -> None:
    """`python -m runtime` and `python -m gateway` by hand, on a port that is in use."""
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(model="pocket"))
    taken = ["--port", str(stack.port), "--replica", stack.worker.url]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gateway", str(file), *taken],
        capture_output=True,
        env=os.environ | ENVIRONMENT,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode != 0
    assert "in use" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_readme_shows_the_question_that_serve_prints() -> None:
    """Word for word, so that what the page promises is what the tests ask."""
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(curl("http://127.0.0.1:8080", "pocket", keys=False)) in readme
