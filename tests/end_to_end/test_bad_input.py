"""Whatever a client sends: a clear 4xx in OpenAI's shape, and the next request is answered.

Every body goes to the gateway and to the worker itself, for both must hold alone.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.end_to_end.stack import BODY_TIMEOUT_S, CHAT, COMPLETIONS, DEFAULTS, Stack, assert_idle

INVALID, MISSING = "invalid_value", "missing_required_parameter"
UNSUPPORTED, TOO_LONG = "unsupported_parameter", "context_length_exceeded"
BAD_GRAMMAR, NO_TOKEN = "unsupported_grammar", "token_out_of_range"
BAD_JSON, BAD_CONTENT = "invalid_json", "unsupported_content"
PYTHON_WORDS = ("tuple", "dictionary", "NoneType", "Traceback", "instance of", "object at 0x")


@dataclass(frozen=True)
class Case:
    """A body, and the problem that it must get; `says` are words of the message."""

    name: str
    path: str
    body: bytes
    param: str | None
    code: str | None
    says: str = ""
    status: int = 400


def chat(name: str, param: str | None, code: str, says: str = "", **change: Any) -> Case:
    body = json.dumps(DEFAULTS[CHAT] | change).encode()
    return Case(name, CHAT, body, param, code, says)


def text(name: str, param: str | None, code: str, says: str = "", **change: Any) -> Case:
    body = json.dumps(DEFAULTS[COMPLETIONS] | change).encode()
    return Case(name, COMPLETIONS, body, param, code, says)


def said(name: str, param: str, content: Any, code: str = INVALID, says: str = "") -> Case:
    return chat(name, param, code, says, messages=[{"role": "user", "content": content}])


def raw(name: str, body: bytes, says: str = "") -> Case:
    return Case(name, CHAT, body, None, BAD_JSON, says)


def with_field(field: bytes) -> bytes:
    """A good chat body with one more raw field in front: what json.dumps would not write."""
    return b"{" + field + b"," + json.dumps(DEFAULTS[CHAT]).encode()[1:]


def tool_cases() -> list[Case]:
    """Tools, tool_choice and past calls."""
    at = "tools.0.function"

    def tool(case: str, param: str, says: str, **function: Any) -> Case:
        given = [{"type": "function", "function": {"name": "f"} | function}]
        return chat(f"tool {case}", param, INVALID, says, tools=given)

    def choice(name: str, param: str, says: str, choice: Any, tools: Any = ()) -> Case:
        return chat(f"choice {name}", param, INVALID, says, tool_choice=choice, tools=[*tools])

    def past(name: str, param: str, says: str, calls: Any, code: str = INVALID) -> Case:
        turn = {"role": "assistant", "tool_calls": calls}
        messages = [{"role": "user", "content": "hi"}, turn]
        param = f"messages.1.tool_calls{param}"
        return chat(f"past {name}", param, code, says, messages=messages)

    good = [{"type": "function", "function": {"name": "f"}}]
    named = {"type": "function", "function": {"name": "g"}}
    return [
        chat("tool without function", "tools.0.function", MISSING, tools=[{"type": "function"}]),
        chat("tool without type", "tools.0.type", MISSING, tools=[{"function": {"name": "f"}}]),
        chat("tool custom", "tools.0.type", UNSUPPORTED, "custom", tools=[{"type": "custom"}]),
        chat("tools twice", "tools.1.function.name", INVALID, "another tool", tools=good * 2),
        chat("functions", "functions", UNSUPPORTED, "send tools", functions=[{"name": "f"}]),
        chat("function_call", "function_call", UNSUPPORTED, "tools", function_call="auto"),
        chat("129 tools", "tools", INVALID, "128", tools=good * 129),
        tool("name", f"{at}.name", "characters", name="get weather"),
        tool("long name", f"{at}.name", "64", name="f" * 65),
        tool("name with an end of line", f"{at}.name", "characters", name="f\n"),
        tool("name number", f"{at}.name", "string", name=5),
        tool("description", f"{at}.description", "string", description=5),
        tool("strict", f"{at}.strict", "true or false", strict="yes"),
        tool("parameters", f"{at}.parameters", "object", parameters=[]),
        tool("parameters type", f"{at}.parameters.type", "'array'", parameters={"type": "array"}),
        tool("properties", f"{at}.parameters.properties", "object", parameters={"properties": 1}),
        tool(
            "property",
            f"{at}.parameters.properties.a",
            "schema",
            parameters={"properties": {"a": 1}},
        ),
        tool("required", f"{at}.parameters.required", "names", parameters={"required": "a"}),
        choice("word", "tool_choice", "'required'", "sometimes"),
        choice("object", "tool_choice", "'required'", {"type": "function"}, good),
        choice("required", "tool_choice", "tools are given", "required"),
        choice("unknown", "tool_choice.function.name", "given: f", named, good),
        chat("parallel", "parallel_tool_calls", INVALID, "true", parallel_tool_calls="no"),
        past("calls", "", "list", {"name": "f"}),
        past("call", ".0", "object", ["f"]),
        past("function", ".0.function", "required", [{"type": "function"}], MISSING),
        past("name", ".0.function.name", "required", [{"function": {}}], MISSING),
        past(
            "arguments", ".0.function.arguments", "", [{"function": {"name": "f", "arguments": 5}}]
        ),
    ]


def formed(name: str, field: str, code: str, json_schema: Any, says: str = "") -> Case:
    asked = {"type": "json_schema", "json_schema": json_schema}
    param = f"response_format.json_schema.{field}"
    return chat(f"format: {name}", param, code, says, response_format=asked)


def schema(name: str, content: dict[str, Any] | str, says: str) -> Case:
    json_schema = {"name": "x", "schema": content, "strict": True}
    return formed(name, "schema", BAD_GRAMMAR, json_schema, says)


def outputs(
    name: str, field: str | None, content: dict[str, Any], says: str, code: str = INVALID
) -> Case:
    param = "structured_outputs" + (f".{field}" if field else "")
    return chat(f"outputs: {name}", param, code, says, structured_outputs=content)


HALF = json.dumps(DEFAULTS[CHAT]).encode()[:-9]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]
LONG = "hello world " * 3000
SCHEMALESS = {"type": "json_schema"}
FREE = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
NESTED: dict[str, Any] = {}
for _ in range(300):
    NESTED = {"items": NESTED}
WILD = "(" * 3000 + "a" + ")" * 3000

JSON_CASES = [
    raw("no body", b"", "empty"),
    raw("broken JSON", b'{"model": "pocket", "messages": [}', "column 34"),
    raw("half of a body", HALF, "end of data"),
    raw("a list", b"[]", "list"),
    raw("a string", b'"hello"', "object"),
    raw("null", b"null", "null"),
    raw("two bodies", b"{}{}", "after document"),
    raw("invalid UTF-8", with_field(b'"a":"\xff\xfe"'), "UTF-8"),
    raw("UTF-16", json.dumps(DEFAULTS[CHAT]).encode("utf-16"), "UTF-8"),
    raw("lone surrogate", with_field(rb'"a":"\ud800"'), "surrogate"),
    raw("nested lists", with_field(b'"a":' + b"[" * 100_000 + b"]" * 100_000), "depth"),
    raw("nested objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "depth"),
    raw("NaN temperature", with_field(b'"temperature":NaN'), "column"),
    raw("infinite temperature", with_field(b'"temperature":-Infinity'), "column"),
    raw("a number beyond a double", with_field(b'"temperature":1e999'), "infinity"),
    raw("an integer of 4000 digits", with_field(b'"seed":' + b"9" * 4000), "infinity"),
    raw("a raw null byte", with_field(b'"a":"\0"'), "control character"),
]
CHAT_CASES = [
    Case("no model", CHAT, b'{"messages":[{"role":"user","content":"x"}]}', "model", MISSING),
    chat("model number", "model", INVALID, "string", model=5),
    chat("model empty", "model", INVALID, model=""),
    Case("no messages", CHAT, b'{"model":"pocket"}', "messages", MISSING),
    chat("messages empty", "messages", INVALID, "at least", messages=[]),
    chat("messages text", "messages", INVALID, "list", messages="hi"),
    chat("messages object", "messages", INVALID, "list", messages={"role": "user"}),
    chat("message text", "messages.0", INVALID, "object", messages=["hi"]),
    chat("message null", "messages.0", INVALID, "object", messages=[None]),
    chat("no role", "messages.0.role", MISSING, messages=[{"content": "hi"}]),
    chat("robot", "messages.0.role", INVALID, "'user'", messages=[{"role": "robot"}]),
    chat("role number", "messages.0.role", INVALID, messages=[{"role": 1, "content": "hi"}]),
    chat("5000 messages", "messages", INVALID, "4096", messages=[{"role": "user"}] * 5000),
    said("content number", "messages.0.content", 5),
    said("content object", "messages.0.content", {"type": "text", "text": "hi"}),
    said("content list of texts", "messages.0.content", ["hi"]),
    said("image", "messages.0.content.0", IMAGE, BAD_CONTENT, "image_url"),
    said("part without type", "messages.0.content.0", [{"text": "hi"}], BAD_CONTENT),
    said("part with a number", "messages.0.content.0", [{"type": "text", "text": 5}], BAD_CONTENT),
    said("over the context", "messages", LONG, TOO_LONG, "shorten"),
    said("5 MB", "messages", "ab " * 1_700_000, TOO_LONG, "shorten"),
    chat("max_tokens 0", "max_tokens", INVALID, "at least 1", max_tokens=0),
    chat("max_tokens -1", "max_tokens", INVALID, "at least 1", max_tokens=-1),
    chat("max_tokens 10**7", "max_tokens", TOO_LONG, "room for", max_tokens=10**7),
    chat("max_tokens 10**30", "max_tokens", INVALID, max_tokens=10**30),
    chat("max_tokens text", "max_tokens", INVALID, "integer", max_tokens="5"),
    chat("max_tokens half", "max_tokens", INVALID, "integer", max_tokens=5.5),
    chat("max_tokens true", "max_tokens", INVALID, "integer", max_tokens=True),
    chat("completion 0", "max_completion_tokens", INVALID, "1", max_completion_tokens=0),
    chat("completion huge", "max_completion_tokens", TOO_LONG, max_completion_tokens=10**6),
    chat("temperature -1", "temperature", INVALID, "at least 0", temperature=-1),
    chat("temperature 3", "temperature", INVALID, "at most 2", temperature=3),
    chat("temperature text", "temperature", INVALID, "number", temperature="hot"),
    chat("top_p 0", "top_p", INVALID, "greater than 0", top_p=0),
    chat("top_p 2", "top_p", INVALID, "at most 1", top_p=2),
    chat("top_k -2", "top_k", INVALID, "-1", top_k=-2),
    chat("top_k 10**30", "top_k", INVALID, top_k=10**30),
    chat("min_p 2", "min_p", INVALID, "at most 1", min_p=2),
    chat("n 0", "n", INVALID, "at least 1", n=0),
    chat("n 1000", "n", INVALID, "at most 16", n=1000),
    chat("n text", "n", INVALID, "integer", n="2"),
    chat("seed text", "seed", INVALID, "integer", seed="x"),
    chat("seed beyond 64 bits", "seed", INVALID, seed=2**65),
    chat("10000 stops", "stop", INVALID, "10000", stop=[f"stop {i}" for i in range(10_000)]),
    chat("stop empty", "stop", INVALID, "1 to 512", stop=""),
    chat("stop long", "stop", INVALID, "1 to 512", stop="x" * 1000),
    chat("stop number", "stop", INVALID, stop=5),
    chat("stop of numbers", "stop.0", INVALID, "string", stop=[1]),
    chat("stop ids text", "stop_token_ids", INVALID, "list", stop_token_ids="end"),
    chat("stop ids of texts", "stop_token_ids.0", INVALID, "integer", stop_token_ids=["end"]),
    chat("stop id negative", "stop_token_ids.0", INVALID, "at least 0", stop_token_ids=[-1]),
    chat("stop id 10**30", "stop_token_ids.0", INVALID, stop_token_ids=[10**30]),
    chat("stop id unknown", "stop_token_ids.1", NO_TOKEN, "0 to 4095", stop_token_ids=[2, 4096]),
    chat("1000 stop ids", "stop_token_ids", INVALID, "64", stop_token_ids=[*range(1000)]),
    chat("stream text", "stream", INVALID, "true", stream="yes"),
    chat("stream number", "stream", INVALID, "true", stream=1),
    chat("stream_options text", "stream_options", INVALID, "object", stream_options="usage"),
    chat(
        "include_usage text",
        "stream_options.include_usage",
        INVALID,
        "true or false",
        stream_options={"include_usage": "yes"},
    ),
    chat("logprobs number", "logprobs", INVALID, "true or false", logprobs=1),
    chat("top_logprobs alone", "top_logprobs", INVALID, "logprobs: true", top_logprobs=2),
    chat("top_logprobs 21", "top_logprobs", INVALID, "20", logprobs=True, top_logprobs=21),
    chat("tools text", "tools", INVALID, "list", tools="weather"),
    chat("tools of numbers", "tools.0", INVALID, "object", tools=[1]),
    *tool_cases(),
    chat("bias list", "logit_bias", INVALID, "object", logit_bias=[1]),
    chat("bias of a text", "logit_bias", INVALID, "decimal", logit_bias={"the": 1}),
    chat("bias of -1", "logit_bias", INVALID, "decimal", logit_bias={"-1": 1}),
    chat("bias of 01", "logit_bias", INVALID, "decimal", logit_bias={"01": 1}),
    chat("bias of 5000 digits", "logit_bias", INVALID, "decimal", logit_bias={"9" * 5000: 1}),
    chat("bias beyond", "logit_bias.4096", NO_TOKEN, "0 to 4095", logit_bias={"4096": 1}),
    chat("bias 101", "logit_bias.5", INVALID, "at most 100", logit_bias={"5": 101}),
    chat("bias text", "logit_bias.5", INVALID, "number", logit_bias={"5": "more"}),
    chat("1025 biases", "logit_bias", INVALID, "1024", logit_bias={str(n): 1 for n in range(1025)}),
    chat("presence 3", "presence_penalty", INVALID, "at most 2", presence_penalty=3),
    chat("frequency -3", "frequency_penalty", INVALID, "at least -2", frequency_penalty=-3),
    chat("presence text", "presence_penalty", INVALID, "number", presence_penalty="much"),
    chat("repetition 0", "repetition_penalty", INVALID, "greater than 0", repetition_penalty=0),
    chat("repetition 1e9", "repetition_penalty", INVALID, "at most 100", repetition_penalty=1e9),
    chat("format text", "response_format", INVALID, "object", response_format="json"),
    chat(
        "format unknown", "response_format.type", INVALID, "'text'", response_format={"type": "x"}
    ),
    chat("format empty", "response_format.type", MISSING, response_format={}),
    chat("no schema", "response_format", INVALID, "json_schema", response_format=SCHEMALESS),
    formed("no name", "name", MISSING, {"schema": {}}),
    formed("schema text", "schema", INVALID, {"name": "x", "schema": "{"}, "JSON"),
    formed("schema number", "schema", INVALID, {"name": "x", "schema": 5}, "schema"),
    formed("strict text", "strict", INVALID, {"name": "x", "strict": "yes"}, "true"),
    schema("broken type", {"type": "strin"}, "strin"),
    schema("unsupported keyword", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    schema("reference out", {"$ref": "https://example.com/a.json"}, "example.com"),
    schema("reference into nothing", {"$ref": "#/$defs/a"}, "does not exist"),
    schema("endless", {"$ref": "#"}, "nothing"),
    schema("impossible", {"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
    schema("look-ahead", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    schema("enormous", {"enum": ["x" * 70_000]}, "at most"),
    schema("2000 free properties", FREE, "items"),
    schema("deep, as text", json.dumps(NESTED), "recursion"),
    chat("format: deep", None, "invalid_json", "nested too deeply", response_format=NESTED),
    outputs("empty", None, {}, "one of"),
    outputs("unknown", "whitespace_pattern", {"regex": "a", "whitespace_pattern": "x"}, "support"),
    outputs("regex number", "regex", {"regex": 5}, "string"),
    outputs("regex empty", "regex", {"regex": ""}, "empty"),
    outputs("regex open", "regex", {"regex": "("}, "unclosed", BAD_GRAMMAR),
    outputs("regex huge", "regex", {"regex": "a" * 70_000}, "16384"),
    outputs("regex wild", "regex", {"regex": WILD}, "nest", BAD_GRAMMAR),
    outputs("choice text", "choice", {"choice": "yes"}, "list"),
    outputs("choice empty", "choice", {"choice": []}, "at least"),
    outputs("choice of numbers", "choice.0", {"choice": [1]}, "string"),
    outputs("grammar open", "grammar", {"grammar": "start: a"}, "a", BAD_GRAMMAR),
    outputs("no grammar", "grammar", {"grammar": "whatever"}, "Lark", BAD_GRAMMAR),
    outputs("grammar loop", "grammar", {"grammar": 'start: start "a"'}, "nothing", BAD_GRAMMAR),
    outputs("two forms", "choice", {"choice": ["a"], "regex": "b"}, "structured_outputs.regex"),
    chat("guided twice", "guided_regex", INVALID, "send one", guided_regex="a", guided_json={}),
    chat(
        "format and guided",
        "guided_choice",
        INVALID,
        "response_format",
        guided_choice=["a"],
        response_format={"type": "json_object"},
    ),
    chat("no end", "ignore_eos", INVALID, "guided_regex", guided_regex="a", ignore_eos=True),
    chat("template variable", "messages", "template_refused", chat_template_kwargs={"messages": 1}),
]
TEXT_CASES = [
    Case("no prompt", COMPLETIONS, b'{"model":"pocket"}', "prompt", MISSING),
    text("prompt number", "prompt", INVALID, "token ids", prompt=5),
    text("prompt empty", "prompt", "empty_prompt", prompt=""),
    text("no prompts", "prompt", INVALID, "empty", prompt=[]),
    text("an empty prompt of ids", "prompt", "empty_prompt", prompt=[[]]),
    text("ids and texts", "prompt", INVALID, "token ids", prompt=[1, "a"]),
    text("ids too deep", "prompt", INVALID, "token ids", prompt=[[[1]]]),
    text("ids of halves", "prompt", INVALID, "token ids", prompt=[1.5]),
    text("ids of truths", "prompt", INVALID, "token ids", prompt=[True]),
    text("id out of range", "prompt", "token_out_of_range", "0 to 4095", prompt=[4096]),
    text("id negative", "prompt", "token_out_of_range", "0 to 4095", prompt=[-1]),
    text("id 10**30", "prompt", INVALID, prompt=[10**30]),
    text("second id", "prompt.1", "token_out_of_range", "9999", prompt=[[1], [9999]]),
    text("1000 prompts", "prompt", INVALID, "128", prompt=["a"] * 1000),
    text("ids over the context", "prompt", TOO_LONG, "5000", prompt=[300] * 5000),
    text("5 MB prompt", "prompt", TOO_LONG, "shorten", prompt="ab " * 1_700_000),
    text("no tokens, no echo", "max_tokens", INVALID, "echo", max_tokens=0),
    text("max_tokens -1", "max_tokens", INVALID, "at least 0", max_tokens=-1),
    text("logprobs 100", "logprobs", INVALID, "20", logprobs=100),
    text("logprobs true", "logprobs", INVALID, "integer", logprobs=True),
    text("best_of", "best_of", UNSUPPORTED, "n choices", best_of=3),
    text("suffix", "suffix", UNSUPPORTED, suffix="end"),
    text("echo text", "echo", INVALID, "true or false", echo="yes"),
]
OTHER_CASES = [
    Case(
        "unknown model",
        CHAT,
        json.dumps(DEFAULTS[CHAT] | {"model": "gpt-9"}).encode(),
        "model",
        "model_not_found",
        "pocket",
        404,
    ),
    Case(
        "10 MB", CHAT, with_field(b'"a":"' + b"x" * 10_000_000 + b'"'), None, "body_too_large",
        "max_body_bytes", 413,
    ),
]  # fmt: skip


def assert_problem(response: Any, case: Case) -> None:
    assert response.status_code == case.status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (case.param, case.code), error
    assert error["type"] == "invalid_request_error"
    assert case.says in error["message"], error["message"]
    assert 10 < len(error["message"]) < 600
    assert not [word for word in PYTHON_WORDS if word in error["message"]], error["message"]
    if case.param:
        assert case.param.split(".")[0] in error["message"], "the message must name the field"


@pytest.mark.parametrize(
    "case",
    [*JSON_CASES, *CHAT_CASES, *TEXT_CASES, *OTHER_CASES],
    ids=lambda case: f"{case.path.split('/')[2]}: {case.name}",
)
def test_a_bad_body_is_a_clear_4xx(stack: Stack, case: Case) -> None:
    """Status, param and code are stable; the message names the field and what was expected."""
    for program in (stack.gateway, stack.worker):
        assert_problem(stack.client.post(program.url + case.path, content=case.body), case)


def test_after_all_of_that_both_programs_work(stack: Stack) -> None:
    """Nothing waits, no block is held, and a good request is answered."""
    assert stack.works()
    assert_idle(stack.worker)


def test_what_looks_odd_but_is_fine_is_answered(stack: Stack) -> None:
    """The last of duplicate keys counts, as in every JSON parser; null bytes are text."""
    twice = with_field(b'"model":"gpt-9","max_tokens":-5,"messages":[]')[:-1] + b',"max_tokens":2}'
    assert stack.client.post(stack.gateway.url + CHAT, content=twice).status_code == 200
    for content in ("a\0b", "", [], None, "\U0010ffff", "<|im_end|>" * 20):
        messages = [{"role": "user", "content": content}]
        assert stack.ask(CHAT, messages=messages, max_tokens=2)["usage"]["completion_tokens"]
    assert stack.ask(CHAT, max_tokens=2, stop_token_ids=[4095], top_k=-1, logit_bias={})
    deep: Any = "x"
    for _ in range(40):
        deep = [deep]
    assert stack.ask(CHAT, max_tokens=2, x_unknown=deep)


# ---- below JSON ---------------------------------------------------------------------------------

BODY = json.dumps(DEFAULTS[CHAT] | {"max_tokens": 1}).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode()
GOOD = HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
HTTP_CASES = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "invalid_http"),
    "no length in digits": (HEAD + b"content-length: ten\r\n\r\n{}", 400, "invalid_http"),
    "two lengths": (
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        400,
        "invalid_http",
    ),
    "length and chunks": (
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "invalid_http",
    ),
    "a length that is too short": (
        HEAD + b"connection: close\r\ncontent-length: 9\r\n\r\n" + BODY,
        400,
        BAD_JSON,
    ),
    "a length that is too long": (
        HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY) + 1, BODY),
        408,
        "request_timeout",
    ),
    "half a body": (HEAD + b"content-length: 99\r\n\r\n{", 408, "request_timeout"),
    "half a header": (HEAD + b"content-le", 408, "request_timeout"),
    "headers over 64 KiB": (HEAD + b"x-a: " + b"a" * 70_000, 431, "headers_too_large"),
    "compressed": (
        HEAD + b"content-encoding: gzip\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
        415,
        "unsupported_content_encoding",
    ),
}


def exchange(stack: Stack, data: bytes, limit_s: float = 20.0) -> bytes:
    """All that comes back for raw bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", stack.port), timeout=limit_s) as sock:
        sock.sendall(data)
        answer = b""
        while more := sock.recv(2**16):
            answer += more
            if b"connection: close" not in answer and complete(answer):
                break
        return answer


def complete(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(length) and len(body) >= int(length[0].split(b":")[1])


@pytest.mark.parametrize("name", HTTP_CASES)
def test_bad_http_is_answered_in_shape(stack: Stack, name: str) -> None:
    """Slow, half-sent, oversized or broken requests end their connection and nothing else."""
    sent, status, code = HTTP_CASES[name]
    started = time.perf_counter()
    head, _, body = exchange(stack, sent).partition(b"\r\n\r\n")
    assert int(head.split(b" ")[1]) == status, head
    assert json.loads(body)["error"]["code"] == code
    if status == 408:
        assert time.perf_counter() - started >= BODY_TIMEOUT_S * 0.9
    assert stack.works()


def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    """Two requests in one packet get two answers on one connection."""
    closing = GOOD.replace(b"host: localhost\r\n", b"host: localhost\r\nconnection: close\r\n")
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as sock:
        sock.sendall(GOOD + closing)
        answers = b""
        while more := sock.recv(2**16):
            answers += more
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.count(b'"chat.completion"') == 2


def test_an_http_1_0_client_is_served(stack: Stack) -> None:
    """`ab` and old proxies speak it: an answer without chunks, then the end."""
    answer = exchange(stack, GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert json.loads(body)["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/gpt-9", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_unknown_paths_and_methods_are_answered_in_shape(
    stack: Stack, method: str, path: str, status: int
) -> None:
    """404 and 405 look like every other error, from the gateway and from the worker."""
    for program in (stack.gateway, stack.worker):
        response = stack.client.request(method, program.url + path)
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
