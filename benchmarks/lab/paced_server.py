"""`python -m benchmarks.lab.paced_server FOLDER`: an OpenAI server whose every moment is known.

The first token comes FIRST_S after a request has, each further one STEP_S after the one before; as
many as `max_tokens` says, told in `usage`. Says its port, keeps the body of every request in
FOLDER/bodies.jsonl, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

MODEL = "paced"
FIRST_S = 0.150
STEP_S = 0.020
_SPOKEN = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + orjson.dumps({**_SPOKEN, "choices": choices, **more}) + b"\n\n"


async def main(folder: Path) -> None:
    bodies = (folder / "bodies.jsonl").open("ab", buffering=0)
    loop = asyncio.get_running_loop()

    async def answer(request: web.Request) -> web.StreamResponse:
        came = loop.time()
        body = await request.read()
        bodies.write(orjson.dumps(orjson.loads(body)) + b"\n")
        asked = orjson.loads(body)
        tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 16)
        words = sum(len(str(one.get("content")).split()) for one in asked["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": tokens}
        usage["total_tokens"] = words + tokens
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk({"role": "assistant", "content": ""}))
        for number in range(tokens):
            await asyncio.sleep(max(came + FIRST_S + number * STEP_S - loop.time(), 0))
            await response.write(chunk({"content": f" word{number}"}))
        end = chunk({}, "length") + chunk(None, usage=usage) + b"data: [DONE]\n\n"
        await response.write(end)
        return response

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    application = web.Application()
    application.router.add_post("/v1/chat/completions", answer)
    application.router.add_get("/v1/models", models)
    application.router.add_get("/health", health)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
