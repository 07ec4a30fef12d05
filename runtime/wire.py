"""The HTTP contract of clients, gateway and runtime: requests, answers, usage, problems, SSE.

Knows OpenAI's shapes (specification 2.3.0) and the fields that vLLM and SGLang clients add; knows
no engine and no torch, so that the gateway and the evals can import it. Unknown request fields are
ignored here and stay untouched in the bytes that the gateway relays.
"""

from __future__ import annotations

import gc
import hmac
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

from cache.conversation import UnreadableContent, joined_text, turn_of
from runtime.wire_format import Form, Formed

LARGE_BODY_BYTES = 2**18
STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 512
STOP_IDS_MAX = 64
CHOICES_MAX = 16
PROMPTS_MAX = 128
MESSAGES_MAX = 4096
TOP_LOGPROBS_MAX = 20
PRIORITY_MAX = 1000
SALT_CHARS_MAX = 256
BIASES_MAX = 1024
REPETITION_MAX = 100.0
BEGUN_MAX = 2**20
DEPTH_MAX = 254  # of lists and objects in each other: orjson reads more than it writes


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
StopIds = Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=STOP_IDS_MAX)]
BegunIds = Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=BEGUN_MAX)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


def _check_ids(value: Any) -> Any:
    for key in value if isinstance(value, dict) else ():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
            raise ValueError('expected token ids as keys, in decimal digits: {"464": -100}')
    return value


Penalty = Annotated[Number, Field(ge=-2, le=2)]
Biases = Annotated[
    dict[str, Annotated[Number, Field(ge=-100, le=100)]],
    Field(max_length=BIASES_MAX),
    BeforeValidator(_check_ids),
]


class _Wire(BaseModel):
    """Frozen, and tolerant of fields that it does not know: clients send many."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class StreamOptions(_Wire):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class _Sampled(Formed):
    """What chat and completions share. Null means the default, as in OpenAI's specification."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop = ()
    stop_token_ids: StopIds | None = None
    ignore_eos: StrictBool | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[StrictInt, Field(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=SALT_CHARS_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=REPETITION_MAX)] | None = None
    logit_bias: Biases | None = None
    begun_token_ids: BegunIds | None = None  # of the answer: what another worker said already

    @property
    def form(self) -> Form | None:
        """The form that the answer must have, if one is asked for."""
        return next(self.forms(), None)


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

    def given(self) -> dict[str, Any]:
        """The fields as they were sent, those that were not left out."""
        fields = {name: getattr(self, name) for name in ("role", "content")}
        if "content" not in self.model_fields_set:
            del fields["content"]
        return fields | (self.model_extra or {})


def _unreadable(where: str, error: UnreadableContent) -> Problem:
    """No model here sees."""
    param = f"{where}.content.{error.at}"
    message = (
        f"{param}: a part of type {error.kind!r} is not supported; send parts of the form "
        "{'type': 'text', 'text': ...} or a plain string"
    )
    return Problem(400, message, param=param, code="unsupported_content")


class Predicted(_Wire):
    """What the client expects the answer to be: OpenAI's predicted outputs."""

    type: Literal["content"]
    content: Annotated[str | tuple[dict[str, Any], ...] | None, PlainValidator(_content)]

    def text(self) -> str:
        """Raises Problem for parts other than text."""
        try:
            return joined_text(self.content) or ""
        except UnreadableContent as error:
            raise _unreadable("prediction", error) from None


class ChatRequest(_Sampled):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Any = None  # the older form of tools, refused
    function_call: Any = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: Predicted | None = None

    def turns(self) -> list[dict[str, Any]]:
        """Messages as plain dictionaries with string content, for the chat template."""
        turns = []
        for at, message in enumerate(self.messages):
            try:
                turns.append(turn_of(message.given()))
            except UnreadableContent as error:
                raise _unreadable(f"messages.{at}", error) from None
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
    refuse_contradictions(request)
    if request.top_logprobs and not request.logprobs:
        raise Problem(
            400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises Problem 400 that names the field, what was expected and what came."""
    request = _parse(CompletionRequest, body)
    refuse_contradictions(request)
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
        raise Problem(
            400, "max_tokens 0 needs echo: true", param="max_tokens", code="invalid_value"
        )
    return request


def refuse_contradictions(request: _Sampled) -> None:
    """An answer can have one form, and ends where that form ends."""
    params = [form.param for form in request.forms()]
    if len(params) > 1:
        message = f"{params[1]} and {params[0]} each ask for a form of the answer: send one of them"
        raise Problem(400, message, param=params[1], code="invalid_value")
    if params and request.ignore_eos:
        message = f"ignore_eos contradicts {params[0]}: an answer of that form has an end"
        raise Problem(400, message, param="ignore_eos", code="invalid_value")


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
        got = "null" if data is None else f"a {JSON_NAMES.get(type(data), 'number')}"
        raise Problem(400, f"the body must be a JSON object, got {got}", code="invalid_json")
    if not _can_be_written(data):
        message = f"the body is nested too deeply: at most {DEPTH_MAX} lists and objects in another"
        raise Problem(400, message, code="invalid_json")
    return data


def _can_be_written(data: dict[str, Any]) -> bool:
    """Whether it can go on: prompts are rendered, hashed and amended from what was parsed.

    Writing all of it takes less time than to look through the bytes for brackets.
    """
    try:
        orjson.dumps(data)
    except TypeError:
        return False
    return True


# `headgate serve` gives one to all it starts, so that no stranger on a worker's port passes for it.
RUN_TOKEN_ENV = "HEADGATE_RUN_TOKEN"  # noqa: S105  # the variable's name
# Of a streaming request: tokens are told in comments, so that another worker could go on.
TOKEN_IDS_HEADER = "x-headgate-token-ids"  # noqa: S105  # the header's name
# Of a streaming request: each chunk tells how many of its tokens a draft had guessed.
MARKS_HEADER = "x-headgate-marks"
CHALLENGE_HEADER = "x-headgate-challenge"  # of a GET /health, whose answer then has `proof`


def run_proof(token: str, challenge: str) -> str:
    """What only a program with the same token can answer to a challenge: HMAC-SHA-256, as hex."""
    return hmac.digest(token.encode(), challenge.encode(), "sha256").hex()


@contextmanager
def collector_off(body: bytes) -> Iterator[None]:
    """Around the life of a large body's JSON tree, which the collector would walk in vain.

    There is no cycle in one, and eight MiB of empty lists would take three to five times as long,
    while streams and engine wait for the interpreter's lock.
    """
    if len(body) <= LARGE_BODY_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


JSON_NAMES = {list: "list", str: "string", bool: "boolean"}
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
    "extra_forbidden": "this field is not supported",
    "literal_error": "expected one of {expected}",
    "greater_than": "expected a number greater than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected a number less than {lt}",
    "less_than_equal": "expected at most {le}",
}

Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], body: bytes) -> Model:
    try:
        with collector_off(body):
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


# ---- server-sent events -------------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


TOKEN_IDS = b": token-ids "


def told_ids(token_ids: Iterable[int]) -> bytes:
    """A comment with the tokens of the event that follows it, and of what it holds back."""
    return TOKEN_IDS + ",".join(map(str, token_ids)).encode() + b"\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One SSE event with a JSON payload."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"
