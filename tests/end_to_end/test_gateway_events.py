"""A real worker's events behind the gateway: what the gateway knows is what the worker has, and
what it foresees of a prompt is what the worker finds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop

from cache.blocks import BLOCK_TOKENS, chain_hashes
from cache.prefix_index import Mode, PrefixIndex
from command.machine import free_ports
from gateway.call import CHAT_PATH, COMPLETIONS_PATH, parse_call
from gateway.prompt import root
from gateway.replica import Replica
from tests.end_to_end.stack import ROOT, START_S, Program, assert_idle
from tests.end_to_end.test_events import worker
from tests.gateway.world import Front, gateway, until
from tests.runtime.subscriber import Subscriber

POCKET = ROOT / "pocket" / "target"
TOOL = {
    "type": "function",
    "function": {"name": "track", "parameters": {"type": "object", "properties": {}}},
}


def on_loop(test: Coroutine[Any, Any, None]) -> None:
    """With a limit against hanging that leaves room for two starts of a worker."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(test, 2 * START_S))


def everything(batches: Iterable[bytes]) -> dict[int, tuple[int | None, list[int], Any]]:
    """Every block that was ever told of, in any medium: its parent, tokens and salt."""
    found = {}
    for payload in batches:
        for event in msgspec.msgpack.decode(payload)[1]:
            if event["type"] != "BlockStored":
                continue
            parent, tokens = event["parent_block_hash"], event["token_ids"]
            for at, name in enumerate(event["block_hashes"]):
                cut = tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
                found[name] = (parent, cut, event["extra_keys"][at])
                parent = name
    return found


def ours(names: Iterable[int], ever: Mapping[int, tuple[int | None, list[int], Any]]) -> set[bytes]:
    """Blocks under the gateway's names."""
    found = set()
    for name in names:
        parent, tokens, salt = ever[name]
        while parent is not None:
            parent, before, salt = ever[parent]
            tokens = before + tokens
        stem = root("pocket", None, salt[0] if salt else None)
        found.add(chain_hashes(stem, tokens)[-1])
    return found


@dataclass
class Pair:
    """The gateway in this process and a worker, which is asked itself as well."""

    edge: Front
    worker: Program
    live: str
    replay: str

    @property
    def index(self) -> PrefixIndex:
        return self.edge.live.edge.index

    async def truth(self) -> dict[str, set[bytes]]:
        """All that a subscriber comes to know, by medium."""

        def ask() -> dict[str, set[bytes]]:
            with Subscriber(self.live, self.replay) as subscriber:
                batches = subscriber.replay(0)
            for _, number, payload in batches:
                subscriber.known.take(number, payload, replayed=True)
            ever = everything(payload for *_, payload in batches)
            media = {"GPU": subscriber.known.blocks, **subscriber.known.below}
            return {medium: ours(blocks, ever) for medium, blocks in media.items()}

        return await asyncio.to_thread(ask)

    async def agree(self) -> int:
        """Waits until the index is what the worker says; how many blocks that are."""
        url = self.worker.url
        await asyncio.to_thread(assert_idle, self.worker, START_S)  # blocks come back behind it
        health = await asyncio.to_thread(self.worker.health)
        last = health["kv_events"]["batches"] - 1

        def caught_up() -> bool:
            followed = self.edge.live.edge.events._followed.get(url)
            return followed is not None and followed.followers[0].source.last == last

        await until(lambda: caught_up() and self.index.mode(url) is Mode.EXACT)
        truth = await self.truth()
        for medium in ("GPU", "CPU"):
            assert self.index.told(url, medium) == truth.get(medium, set())
        assert len(truth["GPU"]) == health["blocks"]["cached"]
        return len(truth["GPU"])

    async def foreseen(self, path: str, body: dict[str, Any]) -> int:
        """Tokens that the index foresees of a request, by the prompt as the gateway reads it."""
        call = parse_call(path, json.dumps(body).encode(), [], "r")
        prompt = await self.edge.live.edge.prompts.read(call)
        assert prompt.exact
        blocks = self.index.in_pool(prompt.hashes).get(self.worker.url, 0)
        return min(blocks, (prompt.tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS

    async def ask(self, path: str, body: dict[str, Any]) -> int:
        """Sends a request through the gateway; `cached_tokens` of its answer."""
        answer = await self.edge.post(body, path)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@contextlib.asynccontextmanager
async def pair(folder: Path, kv_tokens: int, more: str = "") -> AsyncIterator[tuple[Pair, Any]]:
    """Both, and what starts the worker again at the same place."""
    port, live, replay = free_ports(3)
    policy = folder / "policy.yaml"
    policy.write_text(
        f"version: 1\nruntime:\n  kv_tokens: {kv_tokens}\n  threads: 1\n  kv_events:\n"
        f"    endpoint: tcp://127.0.0.1:{live}\n    replay_endpoint: tcp://127.0.0.1:{replay}\n{more}"
    )

    def start() -> contextlib.AbstractContextManager[Program]:
        return worker(folder, policy, port)

    with start() as one:
        replica = Replica(one.url, own=True, tokenizer=POCKET)
        async with gateway(replica) as edge:
            await edge.live.edge.prompts.loaded()
            yield Pair(edge, one, f"tcp://127.0.0.1:{live}", f"tcp://127.0.0.1:{replay}"), start


def chat(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "pocket", "messages": messages, "max_tokens": 8, "temperature": 0} | more


def test_what_the_gateway_foresees_is_what_the_worker_finds(tmp_path: Path) -> None:
    """Chats that grow, tools, salts and completions, twice each: before each request the blocks
    that the index has of it are the tokens that the worker then reports as cached."""

    async def run() -> None:
        async with pair(tmp_path, 8192) as (both, _):
            order = "Where is order JR-9265? It was sent on Monday, I think. " * 4
            grown = [
                {"role": "user", "content": order},
                {"role": "assistant", "content": "In the depot."},
                {"role": "user", "content": "And since when? Tell me all that you know of it."},
            ]
            requests = [
                (CHAT_PATH, chat(order)),
                (CHAT_PATH, chat(order, messages=grown)),
                (CHAT_PATH, chat(order, tools=[TOOL])),
                (CHAT_PATH, chat(order, cache_salt="blue")),
                (CHAT_PATH, chat(order, cache_salt="red")),
                (COMPLETIONS_PATH, {"model": "pocket", "prompt": order, "max_tokens": 4}),
                (COMPLETIONS_PATH, {"model": "pocket", "prompt": [5] * 100, "max_tokens": 4}),
            ]
            found = []
            for path, body in requests * 2:
                await both.agree()
                foreseen = await both.foreseen(path, body)
                found.append(await both.ask(path, body))
                assert found[-1] == foreseen, body
            assert all(found[len(requests) :])
            ladder = both.edge.live.edge.ladder
            assert ladder.delivered == ladder.captured == sum(found)
            assert (ladder.requests, ladder.evicted, ladder.load) == (len(found), 0, 0)
            assert found[3] == found[4] == 0, "salts keep prompts apart"

    on_loop(run())


def test_the_index_is_what_the_worker_says_through_everything(tmp_path: Path) -> None:
    """Requests, evictions by a pool that is too small into host memory, a reset, a kill in
    mid-answer, and a new life with other prompts."""

    async def run() -> None:
        async with pair(tmp_path, 1024, "  tiers: {host_bytes: 16 MiB}\n") as (both, start):
            for at in range(12):
                await both.ask(CHAT_PATH, chat(f"Order {at * 77} is late. " * 25))
            total = both.worker.health()["blocks"]["total"]
            assert total // 2 < await both.agree() <= total, "the pool was filled several times"
            assert both.index.told(both.worker.url, "CPU"), "and what it gave up is in memory"
            await asyncio.to_thread(httpx.post, both.worker.url + "/reset_prefix_cache")
            assert await both.agree() == 0
            await both.ask(CHAT_PATH, chat("Order 9 is late. " * 25))
            assert await both.agree() > 0
            streamed = chat("Count. ", stream=True, max_tokens=400, ignore_eos=True)
            with contextlib.suppress(httpx.TransportError):
                async with both.edge.client.stream("POST", CHAT_PATH, json=streamed) as answer:
                    async for _ in answer.aiter_raw():
                        both.worker.process.send_signal(signal.SIGKILL)
            url = both.worker.url
            await until(lambda: both.index.told(url) == set())
            await until(lambda: both.index.mode(url) is Mode.APPROXIMATE)
            both.worker.process.wait()
            with contextlib.ExitStack() as stack:
                both.worker = await asyncio.to_thread(stack.enter_context, start())
                await until(lambda: both.edge.pool.replicas[0].healthy)
                await both.ask(CHAT_PATH, chat("Is anybody there? " * 20))
                assert await both.agree() > 0

    on_loop(run())
