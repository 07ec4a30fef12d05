"""The engine's outputs -> OpenAI-shaped answers, streamed or whole.

Knows both endpoints' shapes; knows no sockets and no threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

from cache.tokens import Tokenizer
from runtime import shapes, wire
from runtime.grammar import CompiledGrammar
from runtime.orders import Asked, alternatives, make_orders
from runtime.sequence import Output, Service
from runtime.shapes import CallDelta, Envelope, FinishReason, Piece, TokenLogprob, Usage
from runtime.tool_answers import ToolReply
from runtime.tool_request import ToolUse
from runtime.wire import ChatRequest, CompletionRequest, Problem


@dataclass(slots=True)
class _Choice:
    """One answer in the making."""

    index: int
    echo: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    opened: bool = False
    cached_tokens: int = 0
    tools: ToolReply | None = None
    tokens: int = 0  # since the last piece, and how many of them a draft had guessed
    guessed: int = 0
    rejected: int = 0
    right: int = 0  # guesses of the same step whose outputs are still to come

    def count(self, output: Output) -> None:
        """A step's outputs come in order: first the guesses that were right, then one token more,
        and the first of them tells how many were."""
        self.right = output.accepted_tokens or self.right
        tokens = len(output.token_ids)
        guessed = min(self.right, tokens)
        self.right -= guessed
        self.tokens += tokens
        self.guessed += guessed
        self.rejected += output.rejected_tokens

    def counted(self, piece: Piece) -> Piece:
        """The piece that leaves now, with its counts."""
        told = replace(piece, tokens=self.tokens, guessed=self.guessed, rejected=self.rejected)
        self.tokens = self.guessed = self.rejected = 0
        return told


class Answer:
    """What one request gets: its orders, then its chunks or its whole body."""

    def __init__(
        self,
        asked: Asked,
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        *,
        limit_tokens: int,
        vocabulary: int,
        fingerprint: str,
        service: Service,
        adapter: str | None,
        tools: ToolUse | None = None,
        grammar: CompiledGrammar | None = None,
        prediction: Many[int] = (),
        tells_ids: bool = False,
        marks: bool = False,
    ) -> None:
        self._asked = asked
        self._wants_logprobs = alternatives(asked) is not None
        self._copies = asked.n or 1
        self.orders = make_orders(
            asked, prompts, limit_tokens, vocabulary, service, adapter, tools, grammar, prediction
        )
        self._choices = [
            _Choice(index, tools=ToolReply(tools, index) if tools else None)
            for index in range(len(self.orders))
        ]
        if isinstance(asked, CompletionRequest) and asked.echo:
            texts = _echo_texts(asked, prompts, tokenizer)
            for choice in self._choices:
                choice.echo = texts[choice.index // self._copies]
        self._by_key: dict[int, _Choice] = {}
        self.left: list[int] = []  # sequences that go on, though their choices have ended
        begun = sum(len(order.begun) for order in self.orders)
        self._usage = Usage(prompt_tokens=sum(map(len, prompts)), completion_tokens=begun)
        self._marks = marks
        self._tells_ids = tells_ids and len(self.orders) == 1
        self._said_ids: list[int] = []  # since the last piece
        self._piece_ids: deque[list[int]] = deque()  # of pieces that have not left yet
        now = int(time.time())
        chat = isinstance(asked, ChatRequest)
        self._envelope = (
            Envelope.chat(asked.model, now, fingerprint, stream=bool(asked.stream))
            if chat
            else Envelope.completion(asked.model, now, fingerprint)
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
            choice = self._by_key[output.key]
            if choice.finish_reason:
                continue  # it ended before its sequence: behind the only call that it may make
            if output.error is not None:
                raise _failure(output)
            self._usage.completion_tokens += len(output.token_ids)
            self._said_ids += output.token_ids if self._tells_ids else ()
            if self._marks:
                choice.count(output)
            self._usage.accepted_tokens += output.accepted_tokens
            self._usage.rejected_tokens += output.rejected_tokens
            if choice.index % self._copies == 0:  # a prompt counts once, and so what is known of it
                self._usage.cached_tokens += output.cached_tokens - choice.cached_tokens
                choice.cached_tokens = output.cached_tokens
            if output.text or output.logprobs or output.finish_reason:
                logprobs = output.logprobs if self._wants_logprobs else None
                if logprobs and choice.echo and output.token_ids:
                    behind = len(choice.echo)
                    logprobs = tuple(replace(one, offset=one.offset + behind) for one in logprobs)
                piece = Piece(choice.index, output.text, logprobs, output.finish_reason)
                if self._marks:
                    piece = choice.counted(piece)
                for one in choice.tools.read(piece) if choice.tools else [piece]:
                    choice.finish_reason = one.finish_reason
                    if self._tells_ids:
                        self._piece_ids.append(self._said_ids)
                        self._said_ids = []
                    yield one
                if choice.finish_reason and not output.finish_reason:
                    self.left.append(output.key)

    def echo_only(self) -> Iterator[Piece]:
        """The pieces of an answer that needs no engine."""
        for choice in self._choices:
            choice.finish_reason = "length"
            yield Piece(choice.index, "", None, "length")

    # ---- streamed --------------------------------------------------------------------------------

    def events(self, pieces: Iterator[Piece]) -> bytes:
        """The SSE events of some pieces; a choice's first one carries its role or its echo."""
        return b"".join(self._told_ids() + b"".join(self._events(piece)) for piece in pieces)

    def _events(self, piece: Piece) -> Iterator[bytes]:
        *before, last = self._chunks(self._choices[piece.index], piece)
        for chunk in before:
            yield wire.event(self._envelope.wrap([chunk], **self._chunk_usage()))
        yield wire.event(self._envelope.wrap([last], **self._chunk_usage(), **_marks(piece)))

    def _told_ids(self) -> bytes:
        """The tokens of the piece that leaves next, for whoever asked for them."""
        ids = self._piece_ids.popleft() if self._piece_ids else None
        return wire.told_ids(ids) if ids else b""

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
        role = None if choice.opened else shapes.chat_role(piece)
        choice.opened = True
        if role and piece.logprobs:
            # Role alone, as OpenAI sends it: the openai package (3.54, `stream`) counts the
            # logprobs of a further choice's first chunk twice.
            yield shapes.chat_delta(Piece(piece.index, ""), role)
            role = None
        yield shapes.chat_delta(piece, role)

    def _completion_chunks(self, choice: _Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        if not choice.opened:
            choice.opened = True
            piece = Piece(
                piece.index, choice.echo + piece.text, piece.logprobs, piece.finish_reason
            )
        yield shapes.completion_choice(piece)

    # ---- whole -----------------------------------------------------------------------------------

    def gather(self, pieces: Iterator[Piece]) -> None:
        for piece in pieces:
            choice = self._choices[piece.index]
            choice.text.append(piece.text)
            if piece.call:
                choice.calls.append(piece.call)
            choice.logprobs += piece.logprobs or ()

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(choice) for choice in self._choices]
        return self._envelope.wrap(choices, usage=self._usage.payload())

    def _whole_choice(self, choice: _Choice) -> dict[str, Any]:
        piece = Piece(
            choice.index,
            choice.echo + "".join(choice.text),
            tuple(choice.logprobs) if self._wants_logprobs else None,
            choice.finish_reason,
        )
        if isinstance(self._asked, ChatRequest):
            return shapes.chat_choice(piece, shapes.whole_calls(choice.calls))
        return shapes.completion_choice(piece)


def _marks(piece: Piece) -> dict[str, Any]:
    if not piece.tokens:
        return {}
    told = {"tokens": piece.tokens, "guessed": piece.guessed, "rejected": piece.rejected}
    return {"headgate": told}


def _failure(output: Output) -> Problem:
    if output.error_code == "deadline_exceeded":
        return Problem(504, str(output.error), code=output.error_code)
    return Problem(500, f"the engine failed: {output.error}", code=output.error_code)


def _echo_texts(
    asked: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer
) -> list[str]:
    return [
        given if isinstance(given, str) else tokenizer.decode(ids, skip_special=True)
        for given, ids in zip(asked.prompts(), prompts, strict=True)
    ]
