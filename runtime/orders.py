"""A parsed request -> token ids and sampling, bounded: what the engine is asked to do.

Knows both endpoints' fields, the tokenizer and the limits; knows neither answers nor sockets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cache.conversation import chat_ids
from cache.template import TemplateRefusal
from cache.tokens import NoChatTemplate, Tokenizer, TooLong
from runtime import wire
from runtime.grammar import CompiledGrammar
from runtime.inbox import Order
from runtime.sequence import Sampling, Service
from runtime.tool_request import ToolUse, offered
from runtime.wire import ChatRequest, CompletionRequest, Problem

Asked = ChatRequest | CompletionRequest

# One request's bounds: sequences at once, and log-probabilities of its prompts (positions times
# alternatives, about 150 bytes each until the answer is sent).
ORDERS_MAX = 128
SCORED_MAX = 1_000_000

# Headers with targets and a deadline in milliseconds, as gateways and load generators send them.
TTFT_HEADER = b"x-slo-ttft-ms"
TPOT_HEADER = b"x-slo-tpot-ms"
DEADLINE_HEADER = b"x-slo-deadline-ms"
# The gateway's word on how urgent a request is, which goes before the body's own `priority`.
PRIORITY_HEADER = b"x-headgate-priority"
# Names by which a gateway tells what kind of traffic a request is.
TIER_HEADER = b"x-headgate-tier"
ROUTE_HEADER = b"x-headgate-route"
REQUEST_HEADER = b"x-request-id"
_NAME_CHARS_MAX = 64
_TARGET_MS_MAX = 86_400_000.0


def service_of(asked: Asked, headers: Iterable[tuple[bytes, bytes]]) -> Service:
    """What the request asks of the scheduler: its priority, and the targets in its headers.

    Raises Problem 400 for a target that is not a number of milliseconds, and for no priority.
    """
    given = {name: value for name, value in headers if name in _SERVICE_HEADERS}
    ttft_s, tpot_s, deadline_s = (_seconds(name, given.get(name)) for name in _TARGET_HEADERS)
    tier, route = (
        given.get(name, b"").decode("latin-1")[:_NAME_CHARS_MAX]
        for name in (TIER_HEADER, ROUTE_HEADER)
    )
    priority = _priority(given.get(PRIORITY_HEADER), asked.priority or 0)
    request_id = given.get(REQUEST_HEADER, b"").decode("latin-1")[:_NAME_CHARS_MAX]
    return Service(priority, ttft_s, tpot_s, deadline_s, tier, route, request_id)


def _priority(told: bytes | None, own: int) -> int:
    """Raises Problem 400 for what is no integer within the bounds of `priority`."""
    if told is None:
        return own
    digits = told.removeprefix(b"-")
    if not (digits.isdigit() and len(digits) <= 4 and int(digits) <= wire.PRIORITY_MAX):
        header = PRIORITY_HEADER.decode()
        expected = f"an integer from -{wire.PRIORITY_MAX} to {wire.PRIORITY_MAX}"
        message = f"header {header}: expected {expected}, got {told[:40].decode('latin-1')!r}"
        raise Problem(400, message, param=header, code="invalid_value")
    return int(told)


_TARGET_HEADERS = (TTFT_HEADER, TPOT_HEADER, DEADLINE_HEADER)
_SERVICE_HEADERS = (*_TARGET_HEADERS, PRIORITY_HEADER, TIER_HEADER, ROUTE_HEADER, REQUEST_HEADER)


def _seconds(name: bytes, value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        given_ms = float(value)
    except ValueError:
        given_ms = math.nan
    if not 0 < given_ms <= _TARGET_MS_MAX:
        header, got = name.decode(), value[:40].decode("latin-1")
        most = f"{_TARGET_MS_MAX:.0f}"
        message = f"header {header}: expected milliseconds above 0 and at most {most}, got {got!r}"
        raise Problem(400, message, param=header, code="invalid_value")
    return given_ms / 1000


def make_orders(
    asked: Asked,
    prompts: list[list[int]],
    limit_tokens: int,
    vocabulary: int,
    service: Service,
    adapter: str | None = None,
    use: ToolUse | None = None,
    grammar: CompiledGrammar | None = None,
    prediction: Sequence[int] = (),
) -> list[Order]:
    """`n` orders for each prompt, in the order of the answer's choices. Raises Problem 400."""
    copies = asked.n or 1
    if len(prompts) * copies > ORDERS_MAX:
        message = f"{len(prompts)} prompts with {copies} choices each: at most {ORDERS_MAX} in all"
        raise Problem(400, message, param="n", code="too_many_choices")
    for at, prompt in enumerate(prompts):
        room = limit_tokens if asked.max_tokens == 0 else limit_tokens - 1
        _check_prompt(prompt, _param(asked, at), vocabulary, room)
    begun = _begun(asked, prompts, vocabulary, constrained=use is not None or grammar is not None)
    bias, stop_ids = _bias(asked, vocabulary), _stop_ids(asked, vocabulary)
    orders = [
        Order(
            prompt,
            replace(
                _sampling(asked, len(prompt), limit_tokens, copy, use, len(begun)),
                stop_ids=stop_ids,
                logit_bias=bias,
                grammar=grammar,
            ),
            service,
            asked.cache_salt,
            adapter,
            prediction,
            begun,
        )
        for prompt in prompts
        for copy in range(copies)
    ]
    scored = sum(
        len(order.prompt) * (1 + (order.sampling.logprobs or 0))
        for order in orders
        if order.sampling.prompt_logprobs
    )
    if scored > SCORED_MAX:
        message = (
            f"echo with logprobs over {scored} log-probabilities: at most {SCORED_MAX}; send fewer "
            "prompts, choices or alternatives"
        )
        raise Problem(400, message, param="prompt", code="too_many_logprobs")
    return orders


def _begun(
    asked: Asked, prompts: list[list[int]], vocabulary: int, *, constrained: bool
) -> Sequence[int]:
    """What of the answer is said already. Raises Problem 400 where no answer could go on so."""
    begun = asked.begun_token_ids or ()
    if not begun:
        return begun
    echo = isinstance(asked, CompletionRequest) and asked.echo
    several = len(prompts) > 1 or (asked.n or 1) > 1
    if several or constrained or echo or alternatives(asked) is not None:
        message = (
            "begun_token_ids go on with one answer, of no set form, without tools, logprobs or echo"
        )
        raise Problem(400, message, param="begun_token_ids", code="invalid_value")
    for token in (min(begun), max(begun)):
        _check_token(token, "begun_token_ids", vocabulary)
    return begun


def _bias(asked: Asked, vocabulary: int) -> tuple[tuple[int, float], ...]:
    bias = tuple((int(token), amount) for token, amount in (asked.logit_bias or {}).items())
    for token, _ in bias:
        _check_token(token, f"logit_bias.{token}", vocabulary)
    return bias


def _stop_ids(asked: Asked, vocabulary: int) -> frozenset[int]:
    """An id that no answer can have is a mistake: its sender waits for an end that never comes."""
    for at, token in enumerate(asked.stop_token_ids or ()):
        _check_token(token, f"stop_token_ids.{at}", vocabulary)
    return frozenset(asked.stop_token_ids or ())


def _check_token(token: int, param: str, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        message = (
            f"{param}: token id {token} is out of range, this model's ids are 0 to {vocabulary - 1}"
        )
        raise Problem(400, message, param=param, code="token_out_of_range")


def chat_prompt(asked: ChatRequest, tokenizer: Tokenizer, limit_tokens: int) -> list[int]:
    """Token ids of a conversation.

    Raises Problem 400 when the model's template refuses it, or when it is hopelessly long.
    """
    try:
        return chat_ids(
            tokenizer,
            asked.turns(),
            tools=offered(asked),
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            variables=asked.chat_template_kwargs,
            limit_tokens=limit_tokens,
        )
    except TooLong as error:
        raise _too_long("messages", f"at least {error.tokens}", limit_tokens) from error
    except NoChatTemplate as error:
        raise Problem(400, str(error), param="messages", code="no_chat_template") from error
    except RecursionError:
        message = "messages, tools or chat_template_kwargs are nested too deeply"
        raise Problem(400, message, param="messages", code="invalid_value") from None
    except TemplateRefusal as error:
        message = f"this model's chat template refuses the conversation: {error}"
        raise Problem(400, message, param="messages", code="template_refused") from error


def completion_prompts(
    asked: CompletionRequest, tokenizer: Tokenizer, limit_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt; text gets the model's own beginning-of-text token.

    Raises Problem 400 for a text that is hopelessly long.
    """
    given: list[str | list[int]] = [*asked.prompts()]
    prompts: list[list[int]] = []
    for at, prompt in enumerate(given):
        if not isinstance(prompt, str):
            prompts.append(prompt)
            continue
        try:
            tokenizer.check_length(prompt, limit_tokens)
        except TooLong as error:
            least = f"at least {error.tokens}"
            raise _too_long(_param(asked, at), least, limit_tokens) from error
        prompts.append(tokenizer.encode(prompt, special=True))
    return prompts


def predicted(asked: Asked, tokenizer: Tokenizer, limit_tokens: int) -> list[int]:
    """Token ids of what the client expects the answer to be, as far as it can come; [] for none.

    Raises Problem 400 for parts other than text.
    """
    if not isinstance(asked, ChatRequest) or asked.prediction is None:
        return []
    text = asked.prediction.text()
    try:
        tokenizer.check_length(text, limit_tokens)
    except TooLong:  # all of it cannot come, so that nothing is lost with the rest
        text = text[: 4 * limit_tokens]
    return tokenizer.encode(text, special=False)[:limit_tokens]


def _param(asked: Asked, at: int) -> str:
    if isinstance(asked, ChatRequest):
        return "messages"
    return "prompt" if len(asked.prompts()) == 1 else f"prompt.{at}"


def _check_prompt(prompt: list[int], param: str, vocabulary: int, room: int) -> None:
    if not prompt:
        raise Problem(400, f"{param} is empty", param=param, code="empty_prompt")
    for token in (min(prompt), max(prompt)):
        _check_token(token, param, vocabulary)
    if len(prompt) > room:
        raise _too_long(param, str(len(prompt)), room)


def _too_long(param: str, tokens: str, room: int) -> Problem:
    message = (
        f"{param}: the prompt has {tokens} tokens, and this model takes {room} before its answer: "
        "shorten the prompt"
    )
    return Problem(400, message, param=param, code="context_length_exceeded")


def alternatives(asked: Asked) -> int | None:
    """How many alternatives a token's logprobs list; None for no logprobs."""
    if isinstance(asked, CompletionRequest):
        return asked.logprobs
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _sampling(
    asked: Asked,
    prompt_tokens: int,
    limit_tokens: int,
    copy: int,
    use: ToolUse | None,
    begun_tokens: int,
) -> Sampling:
    chat = isinstance(asked, ChatRequest)
    limit = asked.max_completion_tokens if isinstance(asked, ChatRequest) else None
    wanted = limit if limit is not None else asked.max_tokens
    room = limit_tokens - prompt_tokens
    if wanted is None:
        wanted = room if chat else min(16, room)
    if wanted > room:
        param = "max_completion_tokens" if limit is not None else "max_tokens"
        raise Problem(
            400,
            f"{param} is {wanted}, but after {prompt_tokens} prompt tokens this model has room for "
            f"{room} (it holds {limit_tokens} in all)",
            param=param,
            code="context_length_exceeded",
        )
    if begun_tokens and begun_tokens >= wanted:
        message = f"begun_token_ids has {begun_tokens} tokens, and the answer may have {wanted}"
        raise Problem(400, message, param="begun_token_ids", code="invalid_value")
    logprobs = alternatives(asked)
    echo = isinstance(asked, CompletionRequest) and bool(asked.echo)
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        # Choices of one request differ, and each is the same again with the same seed.
        seed=None if asked.seed is None else asked.seed * wire.CHOICES_MAX + copy,
        max_tokens=wanted - begun_tokens,
        stop=asked.stop,
        ignore_eos=bool(asked.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=echo and logprobs is not None,
        shown_ids=frozenset(use.special.values()) if use else frozenset(),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
    )
