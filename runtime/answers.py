"""A parsed request -> orders for the engine; the engine's outputs -> OpenAI-shaped answers.

Knows both endpoints' shapes and the tokenizer; knows no sockets and no threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cache.template import TemplateRefusal
from cache.tokens import NoChatTemplate, Tokenizer, TooLong
from runtime import shapes, wire
from runtime.engine import Order
from runtime.sequence import Output, Sampling
from runtime.shapes import Envelope, FinishReason, Piece, TokenLogprob, Usage
from runtime.wire import ChatRequest, CompletionRequest, Problem

Asked = ChatRequest | CompletionRequest


@dataclass(slots=True)
class _Choice:
    """One answer in the making."""

    index: int
    echo: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    sent_chars: int = 0
    opened: bool = False


class Answer:
    """What one request gets: its orders, then its chunks or its whole body."""

    def __init__(
        self, asked: Asked, prompts: list[list[int]], tokenizer: Tokenizer, limit_tokens: int
    ) -> None:
        self._asked = asked
        self._wants_logprobs = _alternatives(asked) is not None
        for at, prompt in enumerate(prompts):
            room = limit_tokens if asked.max_tokens == 0 else limit_tokens - 1
            _check_prompt(prompt, _param(asked, at), tokenizer, room)
        per_prompt = asked.n or 1
        self.orders = [
            Order(prompt, _sampling(asked, len(prompt), limit_tokens, copy))
            for prompt in prompts
            for copy in range(per_prompt)
        ]
        self._choices = [_Choice(index) for index in range(len(self.orders))]
        if isinstance(asked, CompletionRequest) and asked.echo:
            texts = _echo_texts(asked, prompts, tokenizer)
            for choice in self._choices:
                choice.echo = texts[choice.index // per_prompt]
        self._by_key: dict[int, _Choice] = {}
        self._usage = Usage(prompt_tokens=sum(map(len, prompts)))
        now = int(time.time())
        chat = isinstance(asked, ChatRequest)
        self._envelope = (
            Envelope.chat(asked.model, now, stream=bool(asked.stream))
            if chat
            else Envelope.completion(asked.model, now)
        )
        self._chunks: Callable[[_Choice, Piece], Iterator[dict[str, Any]]] = (
            self._chat_chunks if chat else self._completion_chunks
        )
        options = asked.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    @property
    def needs_engine(self) -> bool:
        """False for an echo of the prompt and nothing else."""
        return any(
            order.sampling.max_tokens > 0 or order.sampling.prompt_logprobs for order in self.orders
        )

    def begin(self, keys: list[int]) -> None:
        """Binds the engine's keys to this answer's choices, in the order of `orders`."""
        self._by_key = dict(zip(keys, self._choices, strict=True))

    @property
    def done(self) -> bool:
        return all(choice.finish_reason for choice in self._choices)

    def take(self, outputs: list[Output]) -> Iterator[Piece]:
        """Counts a step's outputs and gives what of them is visible.

        Raises Problem 500 when the engine failed on one of them.
        """
        for output in outputs:
            if output.error is not None:
                raise Problem(500, f"the engine failed: {output.error}", code="engine_error")
            choice = self._by_key[output.key]
            self._usage.completion_tokens += len(output.token_ids)
            choice.finish_reason = output.finish_reason
            if output.text or output.logprobs or output.finish_reason:
                logprobs = output.logprobs if self._wants_logprobs else None
                yield Piece(choice.index, output.text, logprobs, output.finish_reason)

    def echo_only(self) -> Iterator[Piece]:
        """The pieces of an answer that needs no engine."""
        for choice in self._choices:
            choice.finish_reason = "length"
            yield Piece(choice.index, "", None, "length")

    # ---- streamed --------------------------------------------------------------------------------

    def events(self, pieces: Iterator[Piece]) -> bytes:
        """The SSE events of some pieces; a choice's first one carries its role or its echo."""
        return b"".join(
            wire.event(self._envelope.wrap([chunk], **self._chunk_usage()))
            for piece in pieces
            for chunk in self._chunks(self._choices[piece.index], piece)
        )

    def ending(self) -> bytes:
        """The usage event, if it was asked for, and the end marker."""
        if not self._usage_at_end:
            return wire.DONE
        return wire.event(self._envelope.wrap([], usage=self._usage.payload())) + wire.DONE

    def _chunk_usage(self) -> dict[str, Any]:
        if self._usage_always:
            return {"usage": self._usage.payload()}
        return {"usage": None} if self._usage_at_end else {}

    def _chat_chunks(self, choice: _Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        first, choice.opened = not choice.opened, True
        if first and piece.logprobs:
            # Role alone, as OpenAI sends it: the openai package (3.54, `stream`) counts the
            # logprobs of a further choice's first chunk twice.
            yield shapes.chat_delta(Piece(piece.index, ""), first=True)
            first = False
        yield shapes.chat_delta(piece, first=first)

    def _completion_chunks(self, choice: _Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        if not choice.opened:
            choice.opened = True
            piece = Piece(
                piece.index, choice.echo + piece.text, piece.logprobs, piece.finish_reason
            )
        offset = choice.sent_chars
        choice.sent_chars += sum(len(entry.token) for entry in piece.logprobs or ())
        yield shapes.completion_choice(piece, offset=offset)

    # ---- whole -----------------------------------------------------------------------------------

    def gather(self, pieces: Iterator[Piece]) -> None:
        for piece in pieces:
            choice = self._choices[piece.index]
            choice.text.append(piece.text)
            choice.logprobs += piece.logprobs or ()

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        shape = (
            shapes.chat_choice if isinstance(self._asked, ChatRequest) else shapes.completion_choice
        )
        choices = [
            shape(
                Piece(
                    choice.index,
                    choice.echo + "".join(choice.text),
                    tuple(choice.logprobs) if self._wants_logprobs else None,
                    choice.finish_reason,
                )
            )
            for choice in self._choices
        ]
        return self._envelope.wrap(choices, usage=self._usage.payload())


# ---- request -> prompts and sampling -------------------------------------------------------------


def chat_prompt(asked: ChatRequest, tokenizer: Tokenizer, limit_tokens: int) -> list[int]:
    """Token ids of a conversation.

    Raises Problem 400 when the model's template refuses it, or when it is hopelessly long.
    """
    try:
        return tokenizer.encode_chat(
            asked.turns(),
            tools=list(asked.tools) if asked.tools and asked.tool_choice != "none" else None,
            add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
            continue_final_message=asked.continue_final_message,
            variables=asked.chat_template_kwargs,
            limit_tokens=limit_tokens,
        )
    except TooLong as error:
        raise _too_long("messages", f"at least {error.tokens}", limit_tokens) from error
    except NoChatTemplate as error:
        raise Problem(400, str(error), param="messages", code="no_chat_template") from error
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


def _echo_texts(
    asked: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer
) -> list[str]:
    return [
        given if isinstance(given, str) else tokenizer.decode(ids, skip_special=True)
        for given, ids in zip(asked.prompts(), prompts, strict=True)
    ]


def _param(asked: Asked, at: int) -> str:
    if isinstance(asked, ChatRequest):
        return "messages"
    return "prompt" if len(asked.prompts()) == 1 else f"prompt.{at}"


def _check_prompt(prompt: list[int], param: str, tokenizer: Tokenizer, room: int) -> None:
    if not prompt:
        raise Problem(400, f"{param} is empty", param=param, code="empty_prompt")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < tokenizer.vocab_size:
            raise Problem(
                400,
                f"{param}: token id {token} is out of range, this model's ids are 0 to "
                f"{tokenizer.vocab_size - 1}",
                param=param,
                code="token_out_of_range",
            )
    if len(prompt) > room:
        raise _too_long(param, str(len(prompt)), room)


def _too_long(param: str, tokens: str, room: int) -> Problem:
    message = (
        f"{param}: the prompt has {tokens} tokens, and this model takes {room} before its answer: "
        "shorten the prompt"
    )
    return Problem(400, message, param=param, code="context_length_exceeded")


def _alternatives(asked: Asked) -> int | None:
    """How many alternatives a token's logprobs list; None for no logprobs."""
    if isinstance(asked, CompletionRequest):
        return asked.logprobs
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _sampling(asked: Asked, prompt_tokens: int, limit_tokens: int, copy: int) -> Sampling:
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
    logprobs = _alternatives(asked)
    echo = isinstance(asked, CompletionRequest) and bool(asked.echo)
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        # Choices of one request differ, and each is the same again with the same seed.
        seed=None if asked.seed is None else asked.seed * wire.CHOICES_MAX + copy,
        max_tokens=wanted,
        stop=asked.stop,
        stop_ids=frozenset(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=echo and logprobs is not None,
    )
