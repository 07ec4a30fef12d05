"""Processes that die, that never start, that will not end: what the supervisor makes of them.

Real processes throughout: small HTTP servers stand in for workers and gateway.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from command.machine import free_ports
from command.processes import describe_exit
from command.supervisor import Backoff

ROOT = Path(__file__).parents[2]
WATCHDOG_S = 120  # against hanging: on a machine busy with other work processes start slowly

# python stub.py PORT [BEHAVIOUR [PORT BEHIND]]
STUB = """
import http.server, json, os, signal, sys, threading, time, urllib.request
port, behaviour, behind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print("pid", os.getpid(), flush=True)
if behaviour == "broken":
    print("loading\\nno such model: tiny", file=sys.stderr)
    sys.exit(3)
while behaviour == "late":  # ends once what is behind is well
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{behind}/health", timeout=5).read()
        os.read(os.open(sys.argv[4], os.O_RDONLY), 1)
        sys.exit(3)
    except OSError:
        pass
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "stranger":
            print("asked", flush=True)
        waiting = behaviour == "waiting" and not os.path.exists(sys.argv[4])
        self.send_response(503 if waiting else 200)
        self.end_headers()
        if waiting:
            self.wfile.write(json.dumps({"replicas": [
                {"url": "http://far", "healthy": False, "error": "refused"},
                {"url": f"http://127.0.0.1:{behind}", "healthy": False, "error": "loading"},
                {"url": "http://near", "healthy": True, "error": None},
            ]}).encode())
        else:
            self.wfile.write(b'{"status": "ready"}')
    def log_message(self, *_): pass
if behaviour == "refuses":  # at its second start
    if os.path.exists(sys.argv[4]):
        print("the model is gone", flush=True)
        sys.exit(3)
    open(sys.argv[4], "w")
def drain(*_):
    print("draining", flush=True)
    if behaviour == "stubborn":
        return
    if behind != "0":
        urllib.request.urlopen(f"http://127.0.0.1:{behind}/health", timeout=5).read()
        print("still served from behind", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
if behaviour == "parent":
    import subprocess
    print("grandchild", subprocess.Popen(["sleep", "60"]).pid, flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer)
server.serve_forever()
"""

DRIVER = """
import asyncio, json, sys
from command.processes import Program
from command.screen import Screen
from command.supervisor import Backoff, Supervisor
REFUSAL, FACT = None, None
stub, rows, drain_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
programs = [
    Program(name, (sys.executable, stub, str(port), *behaviour), "127.0.0.1", port, {}, drain_s,
            refusal=REFUSAL, fact=FACT)
    for name, port, *behaviour in rows
]
supervisor = Supervisor(programs, Screen(), backoff=lambda: Backoff(first_s=0.05), patience_s=0)
async def tell():
    for child in supervisor.children:
        await child.ready.wait()
    print("EACH IS WELL", flush=True)
async def main():
    telling = asyncio.create_task(tell())
    return await supervisor.run(lambda took_s: print("READY", flush=True))
sys.exit(asyncio.run(main()))
"""


class Supervised:
    """The driver as a process, read line by line; a watchdog ends a test that hangs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        """Reads on to the first line that matches."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} never came:\n" + "\n".join(self.lines))

    def rest(self) -> int:
        """Reads to the end; the exit code."""
        assert self.process.stdout
        if not self.process.stdout.closed:
            self.lines += self.process.stdout.read().splitlines()
        return self.process.wait()

    def pids(self) -> list[int]:
        """Whoever was killed may have left half a line."""
        found = [re.search(r"(?:pid|grandchild) (\d+)$", line) for line in self.lines]
        return [int(one[1]) for one in found if one]


@contextlib.contextmanager
def supervised(
    folder: Path, *rows: tuple[object, ...], drain_s: float = 5, driver: str = DRIVER
) -> Iterator[Supervised]:
    stub, file = folder / "stub.py", folder / "driver.py"
    stub.write_text(STUB)
    file.write_text(driver)
    process = subprocess.Popen(
        [sys.executable, file, stub, json.dumps(rows), str(drain_s)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    watchdog = threading.Timer(WATCHDOG_S, process.kill)
    watchdog.start()
    running = Supervised(process)
    try:
        yield running
    finally:
        watchdog.cancel()
        process.kill()
        running.rest()
        if process.stdout:
            process.stdout.close()
        gone(running.pids())


def die(port: int) -> None:
    """Kills the stub on a port, as soon as it listens there."""
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/die", timeout=5)
        except OSError as error:
            if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                continue
            return


def gone(pids: list[int]) -> None:
    """Waits until these have ended: the kernel needs a moment, and init need not reap them."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for _ in range(100):
                if process.status() == psutil.STATUS_ZOMBIE:
                    break
                psutil.wait_procs([process], timeout=0.05)
            else:
                raise AssertionError(f"{process} still runs")


def test_ctrl_c_drains_the_front_while_the_worker_still_serves_it(tmp_path: Path) -> None:
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "ok", "0"), ("gateway", front, "ok", str(worker))]
    with supervised(tmp_path, *rows) as running:
        running.until("READY")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        words = [line for line in running.lines if "pid" not in line and "WELL" not in line]
        assert words[1:] == [
            "draining: running answers get up to 5 s; Ctrl-C again ends them now",
            "gateway  | draining",
            "gateway  | still served from behind",
            "worker 0 | draining",
        ]


def test_sigterm_drains_too(tmp_path: Path) -> None:
    """A container's runtime sends SIGTERM, a closed terminal SIGHUP."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        (port,) = free_ports(1)
        with supervised(tmp_path, ("gateway", port, "ok", "0")) as running:
            running.until("READY")
            running.process.send_signal(number)
            assert running.rest() == 0


def test_a_closed_terminal_drains_though_nothing_can_be_shown(tmp_path: Path) -> None:
    """Writing to it fails with EIO, which once cut the streams; SIGHUP may come twice."""
    worker, front = free_ports(2)
    stub, driver = tmp_path / "stub.py", tmp_path / "driver.py"
    stub.write_text(STUB.replace('print("draining"', 'open(f"{__file__}.{port}", "w"); print("d"'))
    driver.write_text(DRIVER)
    rows = json.dumps([("worker 0", worker, "ok", "0"), ("gateway", front, "ok", str(worker))])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, driver, stub, rows, "5"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    watchdog = threading.Timer(WATCHDOG_S, process.kill)
    watchdog.start()
    os.close(theirs)
    seen = b""
    while b"READY\r\n" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    watchdog.cancel()
    drained = {file.suffix for file in tmp_path.glob("stub.py.*")}
    assert drained == {f".{worker}", f".{front}"}


def test_a_bug_in_the_drain_leaves_nothing_running(tmp_path: Path) -> None:
    """Where the kernel does not end children with their parent, somebody has to."""
    (port,) = free_ports(1)
    driver = DRIVER.replace(
        "supervisor = Supervisor(programs, Screen(),",
        "class Broken(Screen):\n"
        "    def say(self, *lines): raise RuntimeError(lines)\n"
        "supervisor = Supervisor(programs, Broken(),",
    )
    driver = driver.replace("sys.exit(asyncio", "try:\n    sys.exit(asyncio")
    driver += (
        "except RuntimeError:\n"
        "    print('left', [child.process.returncode for child in supervisor.children])\n"
    )
    with supervised(tmp_path, ("gateway", port, "ok", "0"), driver=driver) as running:
        running.until("READY")
        running.process.send_signal(signal.SIGTERM)
        assert running.rest() == 0
        assert "left [-9]" in running.lines


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """An hour of patience is not waited for."""
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "stubborn", "0"), ("gateway", front, "stubborn", "0")]
    with supervised(tmp_path, *rows, drain_s=3600) as running:
        running.until("READY")
        running.process.send_signal(signal.SIGINT)
        running.until("gateway  . draining")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 130


def test_a_program_that_will_not_end_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with supervised(tmp_path, ("gateway", port, "stubborn", "0"), drain_s=0.1) as running:
        running.until("READY")
        running.process.send_signal(signal.SIGTERM)
        assert running.rest() == 0
        assert "gateway did not end in 0.1 s: killed" in running.lines


def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    """Twice, and the gateway goes on meanwhile."""
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "ok", "0"), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("EACH IS WELL")
        for pause in ("0.05", "0.1"):
            die(worker)
            running.until(f"worker 0 was killed by SIGKILL .* starts again in {pause} s")
            running.until("worker 0 is ready again after")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        assert sum("gateway  | pid" in line for line in running.lines) == 1


def test_a_gateway_that_dies_is_started_again(tmp_path: Path) -> None:
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "ok", "0"), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("READY")
        die(front)
        running.until("gateway is ready again after")


def test_a_worker_that_never_was_ready_ends_it_all_with_its_last_lines(tmp_path: Path) -> None:
    """A bad model would fail again and again: no restart, exit code 1, nothing left running."""
    worker, front = free_ports(2)
    # A gateway is not ready before its worker: were it, the worker's death would end nothing.
    rows = [
        ("worker 0", worker, "broken", "0"),
        ("gateway", front, "waiting", str(worker), str(tmp_path / "never")),
    ]
    with supervised(tmp_path, *rows) as running:
        assert running.rest() == 1
        told = running.lines.index(
            "worker 0 ended with exit code 3 before it was ready; its last lines:"
        )
        assert running.lines[-1] == "  no such model: tiny"
        assert told == len(running.lines) - 4
        assert sum("worker 0 | pid" in line for line in running.lines) == 1


def test_a_worker_that_fails_while_others_already_serve_does_not_end_them(tmp_path: Path) -> None:
    """It is started again, with pauses that grow."""
    late, front = free_ports(2)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    rows = [("worker 1", late, "late", str(front), str(gate)), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("READY")
        gate.write_text("go")
        running.until("worker 1 ended with exit code 3; it starts again in 0.05 s")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0


def test_a_worker_that_refuses_its_model_at_a_restart_is_left_down(tmp_path: Path) -> None:
    """Its last words once, no loop; the gateway goes on."""
    worker, front = free_ports(2)
    rows = [
        ("worker 0", worker, "refuses", "0", str(tmp_path / "once")),
        ("gateway", front, "ok", "0"),
    ]
    driver = DRIVER.replace("REFUSAL, FACT = None", "REFUSAL, FACT = 3")
    with supervised(tmp_path, *rows, driver=driver) as running:
        running.until("READY")
        die(worker)
        running.until("worker 0 ended with exit code 3; starting it again would not help; its last")
        running.until("^  the model is gone")
        assert urllib.request.urlopen(f"http://127.0.0.1:{front}/", timeout=5).status == 200
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        assert sum("worker 0 | pid" in line for line in running.lines) == 2
        assert "worker 0 ended" not in " ".join(running.lines[-3:])


def test_a_start_that_waits_says_for_what_and_says_it_once(tmp_path: Path) -> None:
    """An upstream out of reach is told; a worker that only loads is not, for a while."""
    worker, front = free_ports(2)
    gate = tmp_path / "gate"
    rows = [
        ("worker 0", worker, "ok", "0"),
        ("gateway", front, "waiting", str(worker), str(gate)),
    ]
    with supervised(tmp_path, *rows) as running:
        running.until("still waiting for http://far: refused")
        gate.write_text("go")
        running.until("READY")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        assert sum("still waiting" in line for line in running.lines) == 1


def test_a_stranger_on_the_port_does_not_pass_for_the_program(tmp_path: Path) -> None:
    """Any server answers 200; ours also tell their facts."""
    (port,) = free_ports(1)
    driver = DRIVER.replace("REFUSAL, FACT = None, None", "REFUSAL, FACT = None, 'blocks'")
    with supervised(tmp_path, ("gateway", port, "stranger", "0"), driver=driver) as running:
        running.until("asked")
        running.until("asked")  # again: the first answer was not believed
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        assert "READY" not in running.lines
    driver = driver.replace("blocks", "status")
    with supervised(tmp_path, ("gateway", port, "ok", "0"), driver=driver) as running:
        running.until("READY")


def test_a_program_that_cannot_be_started_is_no_traceback(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    driver = DRIVER.replace("(sys.executable, stub,", "('/no/such/python', stub,")
    file = tmp_path / "driver.py"
    file.write_text(driver)
    rows = json.dumps([("gateway", port, "ok", "0")])
    done = subprocess.run(
        [sys.executable, file, "stub", rows, "1"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "gateway could not be started before it was ready" in done.stderr
    assert "/no/such/python" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
def test_sigkill_of_the_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """The kernel ends the children, even one that ignores SIGTERM."""
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "stubborn", "0"), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("READY")
        while len(pids := running.pids()) < 2:  # whoever is ready may be heard before it is read
            running.until(r"pid \d+$")
        assert all(psutil.pid_exists(pid) for pid in pids)
        running.process.kill()
        running.process.wait()
        gone(pids)


def test_a_death_is_noticed_though_a_grandchild_holds_the_pipe(tmp_path: Path) -> None:
    """asyncio's wait() for a process with a pipe waits for the pipe too; ours must not."""
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "parent", "0"), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("EACH IS WELL")
        die(worker)
        running.until("worker 0 was killed by SIGKILL")
        running.until("worker 0 is ready again")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0


def test_what_a_worker_started_ends_with_it(tmp_path: Path) -> None:
    worker, front = free_ports(2)
    rows = [("worker 0", worker, "parent", "0"), ("gateway", front, "ok", "0")]
    with supervised(tmp_path, *rows) as running:
        running.until("READY")
        running.process.send_signal(signal.SIGINT)
        assert running.rest() == 0
        assert any("grandchild" in line for line in running.lines)


def test_pauses_double_up_to_a_limit_and_are_forgotten_after_a_long_life() -> None:
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(60.0) == 0.5
    assert backoff.after(59.9) == 1.0


def test_an_end_is_told_in_words() -> None:
    assert describe_exit(0) == "ended with exit code 0"
    assert describe_exit(-signal.SIGTERM) == "was killed by SIGTERM"
    assert describe_exit(-9) == "was killed by SIGKILL (out of memory?)"
