"""The HTTP contract of clients, gateway and runtime: requests, answers, usage, problems, SSE.

Knows OpenAI's shapes (specification 2.3.0) and the fields that vLLM and SGLang clients add; knows
no engine and no torch, so that the gateway and the evals can import it. Unknown request fields are
ignored here and stay untouched in the bytes that the gateway relays.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    ValidationError,
)

STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 512
STOP_IDS_MAX = 64
CHOICES_MAX = 16
PROMPTS_MAX = 128
MESSAGES_MAX = 4096
TOP_LOGPROBS_MAX = 20


class Problem(Exception):
    """An answer other than 200, in OpenAI's error shape: `param` the field, `code` stable."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def payload(self) -> dict[str, Any]:
        """The `{"error": {...}}` object; also what an in-band SSE error event carries."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def body(self) -> bytes:
        return orjson.dumps(self.payload())


# ---- requests -----------------------------------------------------------------------------------


def _stop_list(value: Any) -> Any:
    """`stop` may be one string, a list, or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _check_stop(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) > STOP_STRINGS_MAX:
        raise ValueError(f"at most {STOP_STRINGS_MAX} stop strings are accepted, got {len(value)}")
    for text in value:
        if not 0 < len(text) <= STOP_CHARS_MAX:
            raise ValueError(f"each stop string needs 1 to {STOP_CHARS_MAX} characters")
    return value


Stop = Annotated[
    tuple[Annotated[str, Field(strict=True)], ...],
    BeforeValidator(_stop_list),
    AfterValidator(_check_stop),
]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class _Wire(BaseModel):
    """Frozen, and tolerant of fields that it does not know: clients send many."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class StreamOptions(_Wire):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class _Sampled(_Wire):
    """What chat and completions share. Null means the default, as in OpenAI's specification."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[tuple[StrictInt, ...], Field(max_length=STOP_IDS_MAX)] | None = None
    ignore_eos: StrictBool | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    # Accepted only at values that change nothing; anything else is refused by `refuse_unsupported`.
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None


def _content(value: Any) -> Any:
    """A string, null, or a list of parts; which parts are readable is `Message.text`'s to say."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return tuple(value)
    raise ValueError("expected a string or a list of {'type': 'text', 'text': ...} parts")


class Message(BaseModel):
    """One turn. Fields beyond role and content (tool_calls, name, ...) go to the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | tuple[dict[str, Any], ...] | None, PlainValidator(_content)] = None

    def text(self, where: str) -> str | None:
        """Content as one string. Raises Problem for parts other than text: no model here sees."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        texts = []
        for at, part in enumerate(self.content):
            kind = part.get("type")
            if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                message = (
                    f"content part of type {kind!r} is not supported: send {{'type': 'text', "
                    "'text': ...}} parts or a plain string"
                )
                raise Problem(
                    400, message, param=f"{where}.content.{at}", code="unsupported_content"
                )
            texts.append(part[kind])
        return "".join(texts)


class ChatRequest(_Sampled):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def turns(self) -> list[dict[str, Any]]:
        """Messages as plain dictionaries with string content, for the chat template."""
        turns = []
        for at, message in enumerate(self.messages):
            turn = message.model_dump(exclude_none=True)
            if message.content is not None:
                turn["content"] = message.text(f"messages.{at}")
            elif "content" in message.model_fields_set and not turn.get("tool_calls"):
                turn["content"] = ""
            turns.append(turn)
        return turns


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, as text or as token ids, all four forms brought to a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(PROMPT_FORMS)
    if not value:
        raise ValueError("the list of prompts is empty")
    if all(type(one) is int for one in value):
        return [value]
    if len(value) > PROMPTS_MAX:
        raise ValueError(f"at most {PROMPTS_MAX} prompts are accepted, got {len(value)}")
    if all(isinstance(one, str) for one in value) or all(map(_is_ids, value)):
        return value
    raise ValueError(PROMPT_FORMS)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


PROMPT_FORMS = "expected a string, a list of strings, a list of token ids, or a list of such lists"


class CompletionRequest(_Sampled):
    """Body of POST /v1/completions: prompt as text, texts, token ids, or lists of token ids."""

    prompt: Annotated[Any, PlainValidator(_prompts)]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    echo: StrictBool | None = None
    best_of: StrictInt | None = None
    suffix: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One choice group each; all of them text, or all of them token ids."""
        prompts: list[str] | list[list[int]] = self.prompt
        return prompts


def parse_chat(body: bytes) -> ChatRequest:
    """Raises Problem 400 that names the field, what was expected and what came."""
    request = _parse(ChatRequest, body)
    refuse_unsupported(request)
    if request.top_logprobs and not request.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if (request.response_format or {}).get("type", "text") != "text":
        raise Problem(
            400,
            "response_format other than text is not supported by this runtime",
            param="response_format",
            code="unsupported_parameter",
        )
    if request.tool_choice not in (None, "auto", "none"):
        raise Problem(
            400,
            "tool_choice other than auto or none is not supported by this runtime",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises Problem 400 that names the field, what was expected and what came."""
    request = _parse(CompletionRequest, body)
    refuse_unsupported(request)
    if request.best_of not in (None, 1):
        raise Problem(
            400,
            "best_of is not supported: ask for n choices and pick on your side",
            param="best_of",
            code="unsupported_parameter",
        )
    if request.suffix:
        raise Problem(400, "suffix is not supported", param="suffix", code="unsupported_parameter")
    if request.max_tokens == 0 and not request.echo:
        raise Problem(400, "max_tokens 0 needs echo: true", param="max_tokens")
    return request


def refuse_unsupported(request: _Sampled) -> None:
    """A parameter that would change the answer is refused, never silently ignored."""
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    for name, value in neutral.items():
        if getattr(request, name) not in (None, value):
            raise Problem(
                400,
                f"{name} is not supported by this runtime yet; leave it out or send {value}",
                param=name,
                code="unsupported_parameter",
            )
    if request.logit_bias:
        raise Problem(
            400,
            "logit_bias is not supported by this runtime yet; leave it out",
            param="logit_bias",
            code="unsupported_parameter",
        )


def parse_object(body: bytes) -> dict[str, Any]:
    """A request body as a JSON object. Raises Problem 400 with the parser's line and column."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(
            400,
            f"the body is not valid JSON: {error}",
            code="invalid_json",
        ) from None
    if not isinstance(data, dict):
        got = type(data).__name__
        raise Problem(400, f"the body must be a JSON object, got {got}", code="invalid_json")
    return data


# pydantic speaks of Python; clients speak JSON.
PLAIN_WORDS = {
    "missing": "this field is required",
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "tuple_type": "expected a list",
    "string_type": "expected a string",
    "bool_type": "expected true or false",
    "int_type": "expected an integer",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "too_short": "expected at least {min_length} item, got {actual_length}",
    "too_long": "expected at most {max_length} items, got more",
    "string_too_short": "expected a text that is not empty",
    "string_too_long": "expected at most {max_length} characters",
    "literal_error": "expected one of {expected}",
    "greater_than": "expected a number greater than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected a number less than {lt}",
    "less_than_equal": "expected at most {le}",
}

Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate(parse_object(body))
    except ValidationError as error:
        raise problem_of(error) from None


def problem_of(error: ValidationError) -> Problem:
    """The first complaint of pydantic as a Problem; `param` is the path to the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if not _is_union_branch(part)]
    where = ".".join(path)
    plain = PLAIN_WORDS.get(first["type"])
    message = plain.format(**first.get("ctx", {})) if plain else first["msg"]
    message = message.removeprefix("Value error, ")
    missing = first["type"] == "missing"
    return Problem(
        400,
        f"{where}: {message}" if where else message,
        param=where or None,
        code="missing_required_parameter" if missing else "invalid_value",
    )


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


# ---- answers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One position: the chosen token and the most likely ones, natural logarithms.

    `logprob` is None for the first token of an echoed prompt: nothing came before it.
    """

    token: str
    token_id: int
    utf8: bytes
    logprob: float | None
    top: tuple[tuple[str, bytes, float], ...] = ()

    def chat(self) -> dict[str, Any]:
        def entry(token: str, utf8: bytes, logprob: float | None) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(utf8)}

        own = entry(self.token, self.utf8, self.logprob)
        return own | {"top_logprobs": [entry(*top) for top in self.top]}


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def payload(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A step's new text of one choice; `logprobs` has one entry a token when asked for."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one answer repeats."""

    id: str
    created: int
    model: str
    object: str

    @classmethod
    def chat(cls, model: str, created: int, *, stream: bool) -> Envelope:
        name = "chat.completion.chunk" if stream else "chat.completion"
        return cls(f"chatcmpl-{secrets.token_hex(12)}", created, model, name)

    @classmethod
    def completion(cls, model: str, created: int) -> Envelope:
        return cls(f"cmpl-{secrets.token_hex(12)}", created, model, "text_completion")

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more


def chat_logprobs(entries: Iterable[TokenLogprob] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {"content": [entry.chat() for entry in entries], "refusal": None}


def chat_delta(piece: Piece, *, first: bool = False) -> dict[str, Any]:
    """One choice of a chat chunk; the first of an answer carries the role."""
    delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
    if piece.text:
        delta["content"] = piece.text
    return {
        "index": piece.index,
        "delta": delta,
        "logprobs": chat_logprobs(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def chat_choice(piece: Piece) -> dict[str, Any]:
    """One choice of a whole chat answer."""
    return {
        "index": piece.index,
        "message": {"role": "assistant", "content": piece.text, "refusal": None},
        "logprobs": chat_logprobs(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def completion_choice(piece: Piece, *, offset: int = 0) -> dict[str, Any]:
    """One choice of /v1/completions, whole or a chunk after `offset` characters."""
    return {
        "index": piece.index,
        "text": piece.text,
        "logprobs": completion_logprobs(piece.logprobs, offset),
        "finish_reason": piece.finish_reason,
    }


def completion_logprobs(
    entries: tuple[TokenLogprob, ...] | None, offset: int
) -> dict[str, Any] | None:
    """The four parallel lists of the older API; an echoed first token has nulls, as vLLM sends."""
    if entries is None:
        return None
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {token: logprob for token, _, logprob in entry.top}
            if entry.logprob is not None
            else None
            for entry in entries
        ],
        "text_offset": offsets,
    }


# ---- server-sent events -------------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One SSE event with a JSON payload."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"
