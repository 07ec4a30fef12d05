"""The gateway's own description, `GET /openapi.json`: its paths, and what of a request it checks.

A request's other fields are the replica's to judge (docs/requests.md), so they are not described
as wrong or right here: every field passes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from gateway.call import CHAT_PATH, COMPLETIONS_PATH
from gateway.tiers import (
    DEADLINE_HEADER,
    TARGET_MS_MAX,
    TIER_HEADER,
    TPOT_HEADER,
    TTFT_HEADER,
)
from policies.schema import Tier

ERRORS = {
    400: "A field, a header or the body is wrong; `param` names it.",
    401: "No key, or one that is not known, where the policy has tenants.",
    403: "A Host or an Origin that is not this machine, where it has none.",
    404: "No such path, model or receipt.",
    405: "Another method is meant.",
    408: "Headers or body took too long.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A limit of the tenant is reached; Retry-After says for how long.",
    431: "The headers are too large.",
    500: "The gateway failed.",
    502: "The replica failed.",
    503: "More is asked of the replicas than they can do, or none is ready; Retry-After says when.",
    504: "A deadline or a time limit is over.",
}
EXAMPLES_MAX = 8
_STREAM = {"type": ["boolean", "null"], "description": "Server-sent events, ended by [DONE]."}


@cache
def _version() -> str:
    try:
        return importlib.metadata.version("headgate")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def document(
    tiers: Mapping[str, Tier], models: Sequence[str] = (), *, keys: bool
) -> dict[str, Any]:
    """OpenAPI 3.1, by the tiers of a policy and the models that are served now; `keys`: whether
    requests need one."""
    chat = {"messages": {"type": "array", "minItems": 1, "items": {}}}
    text = {"prompt": {"not": {"type": "null"}}}
    paths: dict[str, Any] = {
        CHAT_PATH: {"post": _generation("A chat completion.", chat, tiers, models)},
        COMPLETIONS_PATH: {"post": _generation("A text completion.", text, tiers, models)},
        "/v1/models": {"get": _reading("The models of all replicas that are ready.")},
        "/v1/models/{model}": {
            "get": _reading("One of them.", path=["model"]),
        },
        "/v1/fingerprint": {"get": _reading("What each replica is made of.")},
        "/health": {"get": _reading("Whether requests can be taken; 503 where not.")},
    }
    told: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Headgate",
            "version": _version(),
            "description": "An OpenAI-compatible gateway before replicas of any kind.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _error()}},
    }
    if keys:
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return told


def _generation(
    summary: str, prompt: Mapping[str, Any], tiers: Mapping[str, Tier], models: Sequence[str]
) -> dict[str, Any]:
    model = {"type": "string", "minLength": 1, "description": "One of /v1/models."}
    schema: dict[str, Any] = {
        "type": "object",
        "required": ["model", *prompt],
        "properties": {"model": model, "stream": _STREAM, **prompt},
    }
    if models:
        said = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello"}
        given = {name: said[name] for name in prompt}
        schema["examples"] = [{"model": name, **given} for name in models[:EXAMPLES_MAX]]
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": TARGET_MS_MAX}
    headers = [_header(TIER_HEADER, {"enum": list(tiers)}, "The tier that is asked for.")]
    for name, text in (
        (TTFT_HEADER, "Target for the first token."),
        (TPOT_HEADER, "Target for each further token."),
        (DEADLINE_HEADER, "After this the request is given up."),
    ):
        headers.append(_header(name, number, text))
    headers.append(_header("x-session-id", {"type": "string"}, "Requests that belong together."))
    answer: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {
        "summary": summary,
        "parameters": headers,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer.", "content": answer}, **_errors()},
    }


def _header(name: str, schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema, "description": text}


def _reading(summary: str, path: Sequence[str] = ()) -> dict[str, Any]:
    body = {"application/json": {"schema": {"type": "object"}}}
    text = {"type": "string", "minLength": 1}
    return {
        "summary": summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": text} for name in path
        ],
        "responses": {"200": {"description": summary, "content": body}, **_errors()},
    }


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        str(status): {"description": text, "content": content} for status, text in ERRORS.items()
    }


def _error() -> dict[str, Any]:
    text, either = {"type": "string"}, {"type": ["string", "null"]}
    inner = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": text, "type": text, "param": either, "code": either},
    }
    return {"type": "object", "required": ["error"], "properties": {"error": inner}}
