"""Keeps programs alive: starts them, watches them, restarts them, drains them.

Knows commands and health addresses; knows no policy and no model. Every program gets a session of
its own, so that Ctrl-C reaches only the supervisor, which then ends them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from command.processes import Health, Program, ask, complaints, describe_exit, spawn
from command.screen import Screen

EXIT_DRAINED = 0
EXIT_FAILED = 1
EXIT_KILLED = 130
_KEPT_LINES = 40
_SHOWN_LINES = 12
_LINE_CHARS_MAX = 4000
_PATIENCE_S = 5.0  # before a start says what it waits for
_LOADING_S = 30.0  # before the log says it of our own programs too, which load a model meanwhile
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Backoff:
    """Pauses before restarts: doubling, and forgotten after a long life."""

    first_s: float = 0.5
    longest_s: float = 30.0
    forget_s: float = 60.0
    _next_s: float = 0.0

    def after(self, lived_s: float) -> float:
        """The pause after a life of `lived_s` seconds."""
        if lived_s >= self.forget_s or self._next_s == 0.0:
            self._next_s = self.first_s
        pause_s = self._next_s
        self._next_s = min(self.longest_s, 2 * pause_s)
        return pause_s


@dataclass(slots=True)
class Child:
    """A program as it runs now."""

    program: Program
    backoff: Backoff
    process: asyncio.subprocess.Process | None = None
    health: Health | None = None  # of this life
    said: Health = field(default_factory=dict)  # its last answer, ready or not
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # once ready, in whichever life
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    def serves(self) -> bool:
        """Whether it runs and has been ready."""
        running = self.process is not None and self.process.returncode is None
        return running and self.ready.is_set()

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill_group(self) -> None:
        """Ends what is left of the program and of what it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Runs programs until a signal comes. The last ones are the front: ready last, drained first,
    all of them together."""

    def __init__(
        self,
        programs: Sequence[Program],
        screen: Screen,
        *,
        fronts: int = 1,
        backoff: Callable[[], Backoff] = Backoff,
        now: Callable[[], float] = time.monotonic,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.children = [Child(program, backoff()) for program in programs]
        self._fronts = self.children[-fronts:]
        self._width = max(len(program.name) for program in programs)
        self._screen = screen
        self._now = now
        self._patience_s = patience_s
        self._told: set[str] = set()
        self._started_at = now()
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()
        self._failed: Child | None = None

    async def run(self, announce: Callable[[float], None]) -> int:
        """Calls `announce(seconds)` when the front is ready; returns the exit code at the end."""
        with self._signals():
            keepers = [asyncio.create_task(self._keep(child)) for child in self.children]
            try:
                await self._serve(keepers, announce)
            finally:  # after a bug too: not every system ends children with their parent
                self._stopping.set()
                for child in self.children:
                    if child.process is not None and child.process.returncode is None:
                        child.kill_group()
                await asyncio.gather(*keepers, return_exceptions=True)
        if self._failed is not None:
            self._tell_failure(self._failed)
            return EXIT_FAILED
        return EXIT_KILLED if self._killing.is_set() else EXIT_DRAINED

    async def _serve(
        self, keepers: Sequence[asyncio.Task[None]], announce: Callable[[float], None]
    ) -> None:
        """From the start to the end of the drain. Raises what went wrong in a task."""
        waiting = asyncio.create_task(self._await_ready(announce))
        for task in (*keepers, waiting):
            task.add_done_callback(self._notice)
        await self._stopping.wait()
        waiting.cancel()
        self._screen.settle()
        await self._drain()
        await asyncio.gather(*keepers)
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    # ---- one program, from start to end ----

    async def _keep(self, child: Child) -> None:
        await self._await_others(child.program.waits_for)
        while not self._stopping.is_set():
            started_at = self._now()
            code = await self._live(child)
            if self._stopping.is_set():
                return
            if not child.ready.is_set() and not any(one.ready.is_set() for one in self._fronts):
                # It would fail again; but once others are served, they are not let down for it.
                self._failed = child
                self._stopping.set()
                return
            pause_s = child.backoff.after(self._now() - started_at)
            how = describe_exit(code)
            if code == child.program.refusal:
                what = f"{child.program.name} {how}; starting it again would not help"
                self._tell_last(child, what)
                return
            self._screen.log(f"{child.program.name} {how}; it starts again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def _await_others(self, names: Sequence[str]) -> None:
        """Until they have been ready, or everything ends."""
        others = [child for child in self.children if child.program.name in names]
        for other in others:
            ready = asyncio.create_task(other.ready.wait())
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait([ready, stopping], return_when="FIRST_COMPLETED")
            ready.cancel()
            stopping.cancel()

    async def _live(self, child: Child) -> int:
        """One life of a program; the exit code, negative for a signal."""
        child.health = None
        try:
            life = await spawn(child.program)
        except OSError as error:
            child.lines.append(str(error))
            return 127
        child.process = life.process
        if self._stopping.is_set():  # the drain has not seen this process
            child.kill_group()
        relaying = asyncio.create_task(self._relay(child, life.words))
        watching = asyncio.create_task(self._watch(child))
        code = await life.process.wait()
        watching.cancel()
        child.kill_group()
        # Its last words are still in the pipe; a stranger that holds the pipe open is not awaited.
        await asyncio.wait([relaying], timeout=1.0)
        relaying.cancel()
        life.pipe.close()
        return code

    async def _relay(self, child: Child, words: asyncio.StreamReader) -> None:
        """The program's words, prefixed, line by line; overlong lines are cut."""
        rest = b""
        while chunk := await words.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._hear(child, line)
            rest = rest[-_LINE_CHARS_MAX:]
        if rest:
            self._hear(child, rest)

    def _hear(self, child: Child, line: bytes) -> None:
        text = line.rstrip().rpartition(b"\r")[2].decode("utf-8", "replace")[:_LINE_CHARS_MAX]
        child.lines.append(text)
        self._screen.log(f"{child.program.name.ljust(self._width)} | {text}")

    async def _watch(self, child: Child) -> None:
        """Waits for the first healthy answer of this life."""
        program, started_at = child.program, self._now()
        while child.health is None:
            well, child.said = await ask(program)
            if well:
                child.health = child.said
            else:
                await asyncio.sleep(program.probe_every_s)
        if child.ready.is_set():
            took_s = self._now() - started_at
            self._screen.log(f"{program.name} is ready again after {took_s:.1f} s")
        child.ready.set()

    # ---- all of them ----

    async def _await_ready(self, announce: Callable[[float], None]) -> None:
        for front in self._fronts:
            while not front.ready.is_set():
                took_s = self._now() - self._started_at
                waits = self._waits(front, took_s)
                self._screen.progress("; ".join([f"starting … {took_s:.0f} s", *waits]))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await front.ready.wait()
        self._screen.settle()
        announce(self._now() - self._started_at)

    def _waits(self, front: Child, took_s: float) -> list[str]:
        """What the front says it waits for, once that takes long; news go to the log."""
        if took_s < self._patience_s:
            return []
        own = tuple(f"{child.program.url}:" for child in self.children)
        waits = complaints(front.said)
        for wait in waits:
            loading = wait.startswith(own) and took_s < _LOADING_S
            if wait not in self._told and not loading:
                self._told.add(wait)
                self._screen.log(f"still waiting for {wait}")
        return waits

    async def _drain(self) -> None:
        """The front first, while those behind it still serve it; then they."""
        serving = [front for front in self._fronts if front.serves()]
        if serving and self._failed is None:
            patience = f"running answers get up to {serving[0].program.drain_s:g} s"
            self._screen.say(f"draining: {patience}; Ctrl-C again ends them now")
        await asyncio.gather(*(self._end(front) for front in self._fronts))
        behind = self.children[: -len(self._fronts)]
        while behind:
            under = {name for child in behind for name in child.program.rests_on}
            wave = [child for child in behind if child.program.name not in under] or behind
            await asyncio.gather(*(self._end(child) for child in wave))
            behind = [child for child in behind if child not in wave]

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        child.signal(child.program.stop)
        exited = asyncio.create_task(process.wait())
        killed = asyncio.create_task(self._killing.wait())
        program = child.program
        patience_s = program.drain_s + program.grace_s if self._failed is None else 1.0
        await asyncio.wait([exited, killed], timeout=patience_s, return_when="FIRST_COMPLETED")
        killed.cancel()
        if not exited.done() and not self._killing.is_set():
            self._screen.log(f"{program.name} did not end in {patience_s:g} s: killed")
        child.kill_group()
        await exited

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        # Shell and kernel may both tell that the terminal was closed: twice is no impatience.
        loop.add_signal_handler(signal.SIGHUP, self._stopping.set)
        try:
            yield
        finally:
            for number in (*_STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Drains; a second call ends everything at once."""
        if self._stopping.is_set():
            self._killing.set()
        self._stopping.set()

    def _notice(self, task: asyncio.Task[None]) -> None:
        """A bug in one task ends them all, and is raised by `run`."""
        if not task.cancelled() and task.exception() is not None:
            self._stopping.set()

    def _tell_failure(self, child: Child) -> None:
        process = child.process
        code = process.returncode if process is not None else None
        how = describe_exit(code) if code is not None else "could not be started"
        self._tell_last(child, f"{child.program.name} {how} before it was ready")

    def _tell_last(self, child: Child, what: str) -> None:
        last = [line for line in child.lines if line.strip()][-_SHOWN_LINES:]
        self._screen.log(
            what + ("; its last lines:" if last else ""),
            *(f"  {line}" for line in last),
        )
