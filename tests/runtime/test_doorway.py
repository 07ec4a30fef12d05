"""A worker's door: this machine without a key, whoever has the key with one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from runtime.doorway import STRANGER, Doorway

ROOT = Path(__file__).parents[2]
FAR = {"host": "runtime-0:8000"}


def door(key: str | None) -> httpx.AsyncClient:
    async def app(scope: object, receive: object, send: object) -> None:
        request = Request(scope, receive, send)  # type: ignore[arg-type]
        known = STRANGER not in request.scope.get("extensions", {})
        await JSONResponse({"known": known})(scope, receive, send)  # type: ignore[arg-type]

    transport = httpx.ASGITransport(Doorway(app, key))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def ask(key: str | None, path: str, **headers: str) -> tuple[int, str]:
    async with door(key) as client:
        answer = await client.get(path, headers=headers)
    return answer.status_code, answer.text


@pytest.mark.parametrize(
    "authorization", ["Bearer hg-wrong", "Basic hg-worker", "hg-worker", "Bearer", ""]
)
def test_with_a_key_whoever_lacks_it_learns_only_of_health(authorization: str) -> None:
    """Also from this machine: a container's neighbours come from there, too."""
    status, text = asyncio.run(ask("hg-worker", "/v1/models", authorization=authorization))
    assert (status, "runtime.key_env" in text) == (401, True)
    assert asyncio.run(ask("hg-worker", "/health", authorization=authorization)) == (
        200, '{"known":false}',
    )  # fmt: skip


def test_with_the_key_any_name_will_do_and_without_one_only_this_machine_s() -> None:
    key = {"authorization": "bearer hg-worker"}
    assert asyncio.run(ask("hg-worker", "/metrics", **FAR, **key)) == (200, '{"known":true}')
    assert asyncio.run(ask(None, "/metrics", **FAR))[0] == 403
    assert asyncio.run(ask(None, "/metrics", host="127.0.0.1:9")) == (200, '{"known":true}')


@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        ("{}", "others could ask; give runtime.key_env"),
        ("{key_env: HEADGATE_NO_SUCH_KEY}", "HEADGATE_NO_SUCH_KEY is not set"),
    ],
)
def test_a_worker_listens_to_others_only_with_a_key(
    tmp_path: Path, runtime: str, told: str
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"version: 1\nruntime: {runtime}\n")
    argv = [sys.executable, "-m", "runtime", str(policy), "--port", "1", "--host", "0.0.0.0"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert told in done.stderr
