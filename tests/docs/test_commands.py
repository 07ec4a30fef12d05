"""The documentation is typed as it stands: files are saved, commands run, what is shown comes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from command.machine import free_ports
from tests.docs.given import GIVEN
from tests.docs.pages import Step, missing, steps
from tests.docs.typed import commands, complaint
from tests.end_to_end.stack import ENVIRONMENT, ROOT, START_S, STOP_S, Stack

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "tasks").glob("*.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("compatibility", "console", "fleet", "tracing")),
    ROOT / "examples" / "README.md",
]
SERVE = re.compile(r"(?:[A-Z_]+=\S+ )*headgate serve\b")
LIMIT_S = 300


@dataclass
class Reader:
    """Stands in a folder of its own, before one terminal; `serve` takes another."""

    folder: Path
    ports: dict[str, int]  # as the page says -> as it is here
    serving: list[subprocess.Popen[str]] = field(default_factory=list)

    def do(self, step: Step) -> None:
        text = re.sub(r":(\d{4})\b", self._port, step.command)
        if step.file is not None:
            path = self.folder / step.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not step.runs or lacking(step.command):
            assert complaint(step.command) is None, step.place
        else:
            printed = self.serve(text) if SERVE.match(text) else self.run(step, text)
            shown = missing(step, printed)
            assert not shown, (
                f"{step.place}  {text}\nis shown to print {shown}, and printed\n{printed}"
            )

    def _port(self, found: re.Match[str]) -> str:
        """Until this page serves, the server that everybody has is the one it speaks of."""
        asked = "shared" if found[1] == "8080" and not self.serving else found[1]
        return f":{self.ports.get(asked, found[1])}"

    def run(self, step: Step, text: str) -> str:
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", text],
            cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode in step.codes, f"{step.place}  {text}\n{done.stdout}"
        return done.stdout

    def serve(self, text: str) -> str:
        """Until it says that it is ready; it goes on."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {text}"],
            cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.serving.append(process)
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C here" in line:
                break
        watchdog.cancel()
        printed = "".join(lines)
        assert "ready in" in printed, printed
        return printed

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        here = {
            "HEADGATE_PORT": str(self.ports["8080"]),
            "OMP_NUM_THREADS": "2",
            "PATH": path,
        }
        return os.environ | ENVIRONMENT | here

    def leave(self) -> None:
        for process in self.serving:
            process.send_signal(signal.SIGINT)
        for process in self.serving:
            rest, _ = process.communicate(timeout=STOP_S)
            assert process.returncode == 0, rest


def lacking(command: str) -> bool:
    """Whether it needs what Debian has not: it is read then, as what needs a cluster is."""
    return command.startswith("kubectl ") and kubectl() is None


def kubectl() -> str | None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return shutil.which("kubectl", path=path)


@contextmanager
def reader(folder: Path, todo: list[Step], stack: Stack) -> Iterator[Reader]:
    """With the commands of this checkout, and what pages say that one has."""
    own = any(step.runs and SERVE.match(step.command) for step in todo)
    front = free_ports(1)[0] if own else stack.port
    worker = int(stack.worker.url.rsplit(":", 1)[1])
    ports = {"8080": front, "8081": worker, "8000": worker, "shared": stack.port}
    (folder / "bin").mkdir()
    for name, words in (("headgate", " -P -m headgate"), ("python", "")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        program.chmod(0o755)
    if found := kubectl():
        (folder / "bin" / "kubectl").symlink_to(found)
    it = Reader(folder, ports)
    try:
        yield it
        it.leave()
    finally:
        for process in it.serving:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_to_type_does_what_it_says(
    page: Path, stack: Stack, tmp_path: Path
) -> None:
    """In its order, in one folder; what needs a GPU, a cluster or another engine is parsed."""
    todo = list(steps(page))
    if any("curl " in step.command for step in todo if step.runs) and not shutil.which("curl"):
        pytest.skip("needs curl: apt-get install it")
    text = page.read_text(encoding="utf-8")
    for name, make in GIVEN.items():
        if name in text:
            make(tmp_path / name)
    with reader(tmp_path, todo, stack) as it:
        for step in todo:
            it.do(step)


def test_every_task_is_typed() -> None:
    """A page without a command, or whose blocks nobody recognizes, would pass unseen."""
    for page in PAGES:
        assert [step for step in steps(page) if step.file is None], page


def test_commands_that_pages_mention_exist() -> None:
    """In every page, with the options that it gives them."""
    wrong = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]:
        if page.name not in ("log.md", "CHANGELOG.md"):  # what was, not what is
            text = page.read_text(encoding="utf-8")
            told = [complaint(command, whole=False) for command in commands(text)]
            wrong += [f"{page.name}: {one}" for one in told if one]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("typed", "wrong"),
    [
        ("headgate gate run", "Missing argument 'HYPOTHESIS'"),
        ("headgate serve --on mars my-policy.yaml", "'mars' is not one of"),
        ("headgate serve one.yaml two.yaml", "unexpected extra argument"),
        ("make stak", "the Makefile has no stak"),
        ("docker build --target gatway .", "there is no --target gatway"),
        ("docker compose kill gateway-7", "there is no service gateway-7"),
        ("docker compose --env-file deploy/observe.env up", "there is no deploy/observe.env"),
        ("kubectl apply -k deploy/kubernetes/exmple", "nothing to build in deploy/kubernetes/exm"),
        ("kubectl create secret x --from-literal=HEADGATE_KEYS=1", "asks for HEADGATE_KEYS"),
        ("pip install 'headgate[runtime,rays]'", "there is no extra rays"),
    ],
)
def test_what_is_only_read_is_read_as_programs_would(typed: str, wrong: str) -> None:
    """What needs a cluster or hours is not run: a wrong word in it would stand in the page."""
    assert wrong in str(complaint(typed))


def test_a_script_of_sh_is_typed_as_one_of_bash(tmp_path: Path) -> None:
    """The bug: what stood in blocks of `sh` was read by no test."""
    page = tmp_path / "page.md"
    page.write_text("```sh exit=3\nfalse || exit 3\n```\n\n```text seen\nout\n```\n")
    assert list(steps(page)) == [Step("page.md:1", "false || exit 3\n", shown=("out",), codes=(3,))]
