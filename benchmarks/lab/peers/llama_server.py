"""llama.cpp's server, which guesses tokens as its library alone does not. The format is a GGUF
type. Its CPU time is what the clock of its process says; our side of the connection is not counted.
"""

from __future__ import annotations

import atexit
import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.lab.peers.talk import Answers, Guess, Tokens, guessing, serve

_SERVER = Path(sys.prefix) / "bin" / "llama-server"
_START_S = 60.0
_LOOK_S = 0.05


class LlamaServer:
    """A server of one place, without a cache between prompts."""

    def __init__(self, folder: str, form: str, threads: int) -> None:
        if not _SERVER.exists():
            raise FileNotFoundError(
                "no llama-server in this environment; build it with "
                "`python -m benchmarks.runtime_peers --setup llama-cpp`"
            )
        kind, guess = guessing(form)
        self._port = _free_port()
        model, draft = (
            one / f"model-{kind}.gguf" for one in (Path(folder), Path(folder).with_name("draft"))
        )
        options = {
            "--model": model,
            "--port": self._port,
            "--ctx-size": 2048,
            "--parallel": 1,
            "--threads": threads,
            "--threads-batch": threads,
            "--cache-ram": 0,
            "--fit": "off",
        } | _guessing_options(guess, draft, threads)
        command = [str(part) for option in options.items() for part in option]
        self._process = subprocess.Popen(
            [str(_SERVER), *command, "--no-slots", "--no-cache-prompt"]
        )
        atexit.register(self._process.kill)
        self._wait()
        self.facts: dict[str, Any] = {"version": llama_cpp.__version__}

    def _wait(self) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if self._ask("GET", "/health", None)[0] == http.client.OK:
                    return
            except ConnectionRefusedError:
                pass
            time.sleep(_LOOK_S)
        raise RuntimeError("llama-server did not start; what it printed says why")

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        del threads  # as at the start
        answers, counts = [], {"drafted": 0.0, "accepted": 0.0}
        clock = (~self._process.pid << 3) | 2  # CPUCLOCK_SCHED of clock_getcpuclockid(3)
        before = time.clock_gettime(clock)
        for prompt in prompts:
            status, told = self._ask("POST", "/completion", _request(prompt, new))
            assert status == http.client.OK, told
            answers.append(told["tokens"])
            for name, own in (("drafted", "draft_n"), ("accepted", "draft_n_accepted")):
                counts[name] += told["timings"].get(own, 0)
        cpu_s = time.clock_gettime(clock) - before
        assert all(len(answer) == new for answer in answers), "a request stopped early"
        return Answers(answers, counts if counts["drafted"] else {}, cpu_s)

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, json.dumps(body) if body else None)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


def _guessing_options(guess: Guess | None, draft: Path, threads: int) -> dict[str, Any]:
    if guess is None or guess.proposer == "none":
        return {}
    if guess.proposer == "draft":
        return {
            "--spec-type": "draft-simple",
            "--spec-draft-model": draft,
            "--spec-draft-n-max": guess.count,
            "--spec-draft-threads": threads,
            "--spec-draft-threads-batch": threads,
        }
    return {
        "--spec-type": "ngram-simple",
        "--spec-ngram-simple-size-n": 2,
        "--spec-ngram-simple-size-m": guess.count,
    }


def _request(prompt: list[int], new: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": new,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "return_tokens": True,
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


if __name__ == "__main__":
    serve(LlamaServer)
