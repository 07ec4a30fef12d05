"""The runtime's HTTP server: /v1/chat/completions, /v1/completions, /v1/models,
/v1/fingerprint, /health, /metrics.

Knows the life of a request inside one worker; knows neither policy files nor other workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterable
from time import monotonic
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime import wire
from runtime.answers import Answer
from runtime.constraints import compile_grammar, grammar_spec, tools_of
from runtime.doorway import STRANGER, Doorway
from runtime.engine import Engine
from runtime.inbox import EngineStopped, QueueFull
from runtime.lark import GrammarSpec
from runtime.metrics_page import CONTENT_TYPE
from runtime.orders import (
    Asked,
    chat_prompt,
    completion_prompts,
    predicted,
    service_of,
)
from runtime.shapes import Piece
from runtime.streams import ClientGone, Stream, Streams
from runtime.tool_request import ToolUse
from runtime.tracing import VISIT, Visit, server_timing
from runtime.wire import ChatRequest, Problem
from runtime.worker import Served, Worker

log = logging.getLogger(__name__)

Headers = Iterable[tuple[bytes, bytes]]

_TOKEN_IDS_HEADER = wire.TOKEN_IDS_HEADER.encode()
_MARKS_HEADER = wire.MARKS_HEADER.encode()
# Prompts shorter than this are tokenized in the event loop: a thread's hand-over costs more.
INLINE_BODY_BYTES = 16_384


def create_app(worker: Worker, key: str | None = None) -> Starlette:
    """The ASGI application of one worker, for whoever has the key where there is one."""

    async def health(request: Request) -> Response:
        status, body = worker.health()
        challenge = request.headers.get(wire.CHALLENGE_HEADER)
        if worker.run_token and challenge:
            body["proof"] = wire.run_proof(worker.run_token, challenge)
        if STRANGER in request.scope.get("extensions", {}):
            body = {"status": body["status"]}
        return _json(body, status)

    async def models(_: Request) -> Response:
        served = worker.require()
        names = [served.name, *served.engine.adapters]
        return _json({"object": "list", "data": [_model(served, name) for name in names]})

    async def model(request: Request) -> Response:
        served = worker.require()
        name = request.path_params["name"]
        _check_model(name, served)
        return _json(_model(served, name))

    async def fingerprint(_: Request) -> Response:
        served = worker.require()
        optimizations = list(served.optimizations)
        told = {"model": served.name, **served.fingerprint.payload()}
        return _json(told | {"optimizations": optimizations})

    async def metrics(_: Request) -> Response:
        page = await asyncio.to_thread(worker.require().metrics.text)  # streams flow on meanwhile
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def trace(request: Request) -> Response:
        """The spans of one trace; with POST they are sent, though it was not sampled."""
        tracer, name = worker.tracer, request.path_params["id"]
        if request.method == "POST":
            return _json({"requests": tracer.want(name)})
        return _json({"spans": tracer.spans(name)})

    async def reset_prefix_cache(_: Request) -> Response:
        """As in vLLM: what is cached is not found any more; running answers go on."""
        worker.require().engine.forget_cached()
        return Response(status_code=200)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Completions(worker, chat=True), methods=["POST"]),
            Route("/v1/completions", _Completions(worker, chat=False), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/fingerprint", fingerprint),
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/traces/{id}", trace, methods=["GET", "POST"]),
            Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
        ],
        exception_handlers={
            Problem: _answer_problem,
            HTTPException: _answer_http_error,
            Exception: _answer_unforeseen,
        },
        middleware=[Middleware(Doorway, key=key)],
        lifespan=worker.lifespan,
    )


class _Completions:
    """The two generating endpoints, as raw ASGI: the body is streamed without another layer."""

    def __init__(self, worker: Worker, *, chat: bool) -> None:
        self._worker = worker
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = scope[VISIT] = self._worker.tracer.begin(scope["headers"])
        began, status = monotonic(), 200
        try:
            body = await _read_body(scope, receive, self._worker.max_body_bytes)
            served = self._worker.require()
            asked, answer = await self._understand(body, served, scope["headers"])
            visit.model, visit.fingerprint = asked.model, served.fingerprint.short
            answer.orders = visit.tracked(answer.orders)
            await self._serve(served, asked, answer, receive, send, visit)
        except Problem as problem:
            visit.failed(problem)
            status = problem.status
            await _problem_response(problem, scope)(scope, receive, send)
        except (ClientGone, ClientDisconnect):
            visit.left()
        except Exception as error:  # is answered, and logged, above (`_answer_unforeseen`)
            visit.failed(Problem(500, "", code=type(error).__name__))
            status = 500
            raise
        finally:
            self._worker.tracer.end(visit)
            if self._worker.served is not None:
                tally = self._worker.served.metrics.tally
                tally.answered(scope["path"], status, monotonic() - began)

    async def _understand(
        self, body: bytes, served: Served, headers: Headers
    ) -> tuple[Asked, Answer]:
        """Parses, renders and tokenizes, in a thread what takes long, so that streams flow on."""
        if len(body) > INLINE_BODY_BYTES:
            return await asyncio.to_thread(self._understand_now, body, served, headers)
        asked = self._parse(body, served)
        tools = tools_of(asked, served.tokenizer)
        spec = grammar_spec(asked, tools)
        if spec is not None and served.engine.grammars.known(spec) is None:
            return asked, await asyncio.to_thread(_answer, asked, tools, spec, served, headers)
        return asked, _answer(asked, tools, spec, served, headers)

    def _understand_now(
        self, body: bytes, served: Served, headers: Headers
    ) -> tuple[Asked, Answer]:
        asked = self._parse(body, served)
        tools = tools_of(asked, served.tokenizer)
        return asked, _answer(asked, tools, grammar_spec(asked, tools), served, headers)

    def _parse(self, body: bytes, served: Served) -> Asked:
        asked = wire.parse_chat(body) if self._chat else wire.parse_completion(body)
        _check_model(asked.model, served)
        return asked

    async def _serve(
        self,
        served: Served,
        asked: Asked,
        answer: Answer,
        receive: Receive,
        send: Send,
        visit: Visit,
    ) -> None:
        stream = Stream([])
        if answer.needs_engine:
            stream = _open(self._worker.streams, served.engine, answer)
            served.metrics.tally.asked(asked.n or 1)
        watcher = asyncio.create_task(_watch(receive, stream))
        try:
            if asked.stream:
                await _send_stream(answer, stream, served.engine, send, visit)
            else:
                await _send_whole(answer, stream, served.engine, send, visit)
        finally:
            watcher.cancel()
            self._worker.streams.close(served.engine, stream)


def _answer(
    asked: Asked,
    tools: ToolUse | None,
    spec: GrammarSpec | None,
    served: Served,
    headers: Headers,
) -> Answer:
    engine, tokenizer = served.engine, served.tokenizer
    limit = engine.limit_tokens
    if isinstance(asked, ChatRequest):
        prompts = [chat_prompt(asked, tokenizer, limit)]
    else:
        prompts = completion_prompts(asked, tokenizer, limit)
    return Answer(
        asked,
        prompts,
        tokenizer,
        limit_tokens=limit,
        vocabulary=engine.vocabulary,
        fingerprint=served.fingerprint.short,
        service=service_of(asked, headers),
        adapter=asked.model if asked.model in engine.adapters else None,
        tools=tools,
        grammar=compile_grammar(spec, engine.grammars) if spec else None,
        prediction=predicted(asked, tokenizer, limit),
        tells_ids=any(name == _TOKEN_IDS_HEADER for name, _ in headers),
        marks=any(name == _MARKS_HEADER for name, _ in headers),
    )


def _open(streams: Streams, engine: Engine, answer: Answer) -> Stream:
    try:
        stream = streams.open(engine, answer.orders)
    except QueueFull as error:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_s)))}
        message = f"the queue is full: {error}; try again"
        raise Problem(503, message, code="queue_full", headers=headers) from error
    except EngineStopped as error:
        headers = {"retry-after": "1"}
        raise Problem(503, "the worker is stopping", code="stopping", headers=headers) from error
    answer.begin(stream.keys)
    return stream


async def _pieces(answer: Answer, stream: Stream, engine: Engine) -> AsyncIterator[list[Piece]]:
    """An answer's visible pieces, in batches as they come. Raises Problem, ClientGone."""
    if not answer.needs_engine:
        yield list(answer.echo_only())
    while not answer.done:
        yield list(answer.take(await stream.next()))
        if answer.left:
            engine.cancel(answer.left)
            answer.left.clear()


async def _send_stream(
    answer: Answer, stream: Stream, engine: Engine, send: Send, visit: Visit
) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
        (b"server-timing", visit.phases().header().encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    told = visit.comment  # before the first event, and before the end
    try:
        async for pieces in _pieces(answer, stream, engine):
            if pieces:
                await _send_body(send, told() + answer.events(iter(pieces)))
                told = bytes
        ending = visit.comment() + answer.ending()
        visit.last()
        await _send_body(send, ending, more=False)
    except Problem as problem:
        visit.failed(problem)
        visit.last()
        await _send_body(send, wire.event(problem.payload()) + wire.DONE, more=False)


async def _send_whole(
    answer: Answer, stream: Stream, engine: Engine, send: Send, visit: Visit
) -> None:
    async for pieces in _pieces(answer, stream, engine):
        answer.gather(iter(pieces))
    body = orjson.dumps(answer.whole())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"server-timing", visit.phases().header().encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    visit.last()
    await _send_body(send, body, more=False)


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _watch(receive: Receive, stream: Stream) -> None:
    """Tells the stream when its client leaves, in whatever phase it is."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.leave()


async def _read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """Raises Problem 413 for a body over the limit, before reading more of it."""
    parts: list[bytes] = []
    size = 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            size = int(value)
    if size <= limit_bytes:
        size = 0
        async for part in Request(scope, receive).stream():
            size += len(part)
            if size > limit_bytes:
                break
            parts.append(part)
    if size > limit_bytes:
        raise Problem(
            413,
            f"the body is larger than {limit_bytes} bytes; shorten it, or raise "
            "gateway.max_body_bytes in the policy",
            code="body_too_large",
        )
    return b"".join(parts)


def _check_model(name: str, served: Served) -> None:
    if name != served.name and name not in served.engine.adapters:
        names = ", ".join(map(repr, [served.name, *served.engine.adapters]))
        raise Problem(
            404,
            f"the model {name!r} is not served here; served: {names}",
            param="model",
            code="model_not_found",
        )


def _model(served: Served, name: str) -> dict[str, Any]:
    """An adapter is a model of its own, with the base model as its parent, as in vLLM."""
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "headgate",
        "max_model_len": served.engine.limit_tokens,
        "parent": None if name == served.name else served.name,
        "sampling": dict(served.sampling),
    }


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _problem_response(problem: Problem, scope: Scope) -> Response:
    headers = {**problem.headers, **server_timing(scope)}
    return Response(problem.body(), problem.status, headers, media_type="application/json")


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _problem_response(error, request.scope)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    problem = Problem(error.status_code, message, code=code, headers=headers)
    return _problem_response(problem, request.scope)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    """A fault of ours, in the clients' shape; Starlette logs it with its traceback.

    The server hangs up after it: who knows sends the next request over another connection.
    """
    message = f"{request.method} {request.url.path} failed in the worker: {type(error).__name__}"
    headers = {"connection": "close"}
    problem = Problem(500, message, code="internal_error", headers=headers)
    return _problem_response(problem, request.scope)
