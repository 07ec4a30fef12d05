"""A task of inspect_ai, run by the user's own installation against a server that answers as told.

So it becomes known what the task asks, whatever its solvers do, and how its own scorers judge an
answer. Knows the program and its log; knows nothing of suites.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from evals.adapters.files import NoRun, bytes_of
from evals.adapters.inspect_ai import log_of

CONNECTIONS = 16
TIMEOUT_S = 1800.0
ERROR_CHARS = 600
# What inspect_ai is told, so that it speaks OpenAI's API to us: provider, service and model.
_MODEL, _SERVICE = "openai-api/headgate/any", "HEADGATE"

Answer = Callable[[Mapping[str, Any]], str]  # of a request's body


class Refused(Exception):
    """The task cannot be run, or not be read; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Program:
    """How the task is run: `inspect`, what names the task, and its arguments `NAME=VALUE`."""

    inspect: str
    task: str
    arguments: Sequence[str] = ()
    limit: int | None = None

    async def run(
        self, answer: Answer, *, score: bool, epochs: int = 1, limit: int | None = None
    ) -> Mapping[str, Any]:
        """The log, with `samples`. Raises Refused."""
        limit = limit if limit is not None else self.limit
        with tempfile.TemporaryDirectory() as folder:
            async with _answering(answer) as url:
                command = [
                    self.inspect, "eval", self.task, "--model", _MODEL, "--display", "none",
                    "--log-dir", folder, "--epochs", str(epochs), "--no-epochs-reducer",
                    "--max-connections", str(CONNECTIONS), "--no-fail-on-error",
                    *(("-T", one)[at] for one in self.arguments for at in (0, 1)),
                    *(() if limit is None else ("--limit", str(limit))),
                    *(() if score else ("--no-score",)),
                ]  # fmt: skip
                said = await _said(command, url)
            return _only_log(Path(folder), said)


async def _said(command: Sequence[str], url: str) -> str:
    """What the program printed. It runs where the task is looked for. Raises Refused."""
    told = {f"{_SERVICE}_BASE_URL": url, f"{_SERVICE}_API_KEY": "none"}
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | told, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise Refused(f"{command[0]} cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        raise Refused(f"{command[0]} took more than {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return printed.decode("utf-8", "replace").strip()


def _only_log(folder: Path, said: str) -> Mapping[str, Any]:
    files = sorted(one for one in folder.iterdir() if one.suffix in (".eval", ".json"))
    if not files:
        raise Refused(f"inspect wrote no log. It said:\n{said[-ERROR_CHARS:]}")
    if len(files) > 1:
        raise Refused("the file has several tasks; name one of them: FILE@TASK")
    try:
        head, samples = log_of(files[0], bytes_of(files[0]))
    except NoRun as error:
        raise Refused(str(error)) from None
    if head.get("status") != "success" or not samples:
        why = (head.get("error") or {}).get("message") or said[-ERROR_CHARS:] or "no sample ran"
        raise Refused(f"inspect could not run the task: {why}")
    return {**head, "samples": samples}


@asynccontextmanager
async def _answering(answer: Answer) -> AsyncIterator[str]:
    """The base URL of a server that answers every chat with one text."""

    async def chat(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        message = {"role": "assistant", "content": answer(body)}
        payload = {
            "id": "told", "object": "chat.completion", "created": 0, "model": "any",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        return web.json_response(payload)

    app = web.Application(client_max_size=2**28)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
