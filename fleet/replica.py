"""A replica on its node: one worker of the runtime as a process of its own, which ends with this
one. Knows no Ray and no other replica."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from command.machine import PortError, free_ports
from command.processes import (
    Life,
    Program,
    ask_health,
    describe_exit,
    spawn,
)
from command.run_folder import own_folder
from command.serve import version
from fleet.cluster import Job, Look, Lost
from policies.as_started import environment
from policies.children import package_environment

GRACE_S = 5.0  # after the drain, before SIGKILL
_POLL_S = 0.2
_REFUSED = (2, 3)  # runtime/__main__.py: the policy is wrong, the model cannot be served
_KEPT_LINES = 12
_LINE_CHARS_MAX = 2000


class Replica:
    """A worker from its start to its end."""

    def __init__(self, job: Job, host: str, now: Callable[[], float] = time.monotonic) -> None:
        self.job = job
        self._host = host
        self._now = now
        self._life: Life | None = None
        self._relaying: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._looked_at = now()

    async def start(self) -> str:
        """The URL of the worker, once it is ready. Raises Lost."""
        self._check_node()
        try:
            with own_folder() as folder:
                return await self._begin(folder / "policy.yaml")
        except (PortError, OSError) as error:
            raise Lost(str(error)) from None

    async def _begin(self, copy: Path) -> str:
        """By the policy in the copy, which the worker reads before it is ready, and never again.

        Raises Lost, PortError, OSError.
        """
        (port,) = free_ports(1, self._host)
        program = self._program(port, copy)
        self._life = await spawn(program)
        self._relaying = asyncio.create_task(self._relay(self._life.words))
        while self._life.process.returncode is None:
            status, health = await ask_health(self._host, port, program.key)
            if status == 200 and program.fact in health:
                return program.url
            await asyncio.sleep(_POLL_S)
        code = self._life.process.returncode
        await asyncio.wait([self._relaying], timeout=1.0)
        words = "".join(f"\n  {line}" for line in self._lines)
        raise Lost(f"its worker {describe_exit(code)}{words}", refused=code in _REFUSED)

    async def look(self) -> Look:
        self._looked_at = self._now()
        life = self._life
        running = life is not None and life.process.returncode is None
        return Look(running, () if running else tuple(self._lines))

    @property
    def abandoned(self) -> bool:
        """Whether nobody has looked for as long as its lease."""
        return self._now() - self._looked_at > self.job.lease_s

    async def stop(self) -> None:
        """SIGTERM, which drains; SIGKILL to all that is left after the drain and some seconds."""
        life = self._life
        if life is None or life.process.returncode is not None:
            return
        life.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.job.drain_s + GRACE_S):
                await life.process.wait()
        except TimeoutError:
            os.killpg(life.process.pid, signal.SIGKILL)
            await life.process.wait()

    def _check_node(self) -> None:
        """Raises Lost where this node would serve something else."""
        job = self.job
        if version() != job.version:
            why = f"this node has headgate {version()}, the fleet is of {job.version}"
            raise Lost(why, refused=True)

    def _program(self, port: int, copy: Path) -> Program:
        job = self.job
        copy.write_text(job.text, encoding="utf-8")
        return Program(
            job.name,
            (
                sys.executable, "-P", "-m", "runtime", job.policy,
                "--host", self._host, "--port", str(port), "--rank", str(job.rank),
            ),
            self._host,
            port,
            {**package_environment(), **job.environment, **environment(Path(job.policy), copy)},
            fact="blocks",
            key=job.key,
        )  # fmt: skip

    async def _relay(self, words: asyncio.StreamReader) -> None:
        """The worker's words go to this process's own, which Ray keeps."""
        rest = b""
        while chunk := await words.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace")[:_LINE_CHARS_MAX]
                self._lines.append(text)
                print(f"{self.job.name} | {text}", flush=True)
            rest = rest[-_LINE_CHARS_MAX:]
