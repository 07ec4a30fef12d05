"""One choice's text, a step at a time, into the pieces of an answer that may call tools.

Knows the events of a ToolParser and the pieces of an answer; knows no dialect and no JSON shape.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import replace

from runtime.shapes import CallDelta, FinishReason, Piece, TokenLogprob
from runtime.tool_reader import Arguments, Closed, Opened, Text
from runtime.tool_request import ToolUse
from runtime.tools import ToolParser

_ID_CHARACTERS = string.ascii_letters + string.digits


class ToolReply:
    """Reads one choice. Text that may still become a call is held back, and its tokens'
    log-probabilities with it."""

    def __init__(self, use: ToolUse, index: int) -> None:
        self._use = use
        self._index = index
        self._parser = ToolParser(use.dialect, use.functions)
        self._calls = 0
        self._complete = False
        self._logprobs: list[TokenLogprob] = []

    def read(self, piece: Piece) -> list[Piece]:
        """A step's text as pieces of content and of calls; the last one tells the end.

        An answer that stops behind a complete call has called tools; one that stops or is cut
        within a call has not.
        """
        events = self._parser.push(piece.text)
        if piece.finish_reason:
            events += self._parser.finish()
        self._logprobs += piece.logprobs or ()
        reason = piece.finish_reason
        pieces: list[Piece] = []
        for event in events:
            if not isinstance(event, Closed):
                self._add(pieces, event)
                continue
            self._complete = True
            if not self._use.parallel:
                reason = "stop"
                break
        if reason == "stop" and self._calls and self._complete:
            reason = "tool_calls"
        return self._end(pieces, reason, with_logprobs=piece.logprobs is not None)

    def _add(self, pieces: list[Piece], event: Text | Opened | Arguments) -> None:
        """One more piece, or more of the last one where both are of one kind."""
        last = pieces[-1] if pieces else None
        match event:
            case Text(text):
                if last is not None and last.call is None:
                    pieces[-1] = Piece(self._index, last.text + text)
                else:
                    pieces.append(Piece(self._index, text))
            case Opened(name):
                call = CallDelta(self._calls, id=self._new_id(name), name=name)
                self._calls, self._complete = self._calls + 1, False
                pieces.append(Piece(self._index, "", call=call))
            case Arguments(text):
                call = CallDelta(self._calls - 1, text)
                if last is not None and last.call is not None and last.call.id is None:
                    pieces[-1] = Piece(
                        self._index, "", call=CallDelta(call.at, last.call.arguments + text)
                    )
                else:
                    pieces.append(Piece(self._index, "", call=call))

    def _end(
        self, pieces: list[Piece], reason: FinishReason | None, *, with_logprobs: bool
    ) -> list[Piece]:
        if not pieces and reason is None:
            return []
        pieces = pieces or [Piece(self._index, "")]
        if with_logprobs:
            pieces[0] = replace(pieces[0], logprobs=tuple(self._logprobs))
            self._logprobs.clear()
        pieces[-1] = replace(pieces[-1], finish_reason=reason)
        return pieces

    def _new_id(self, name: str) -> str:
        dialect = self._use.dialect
        random = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(dialect.id_chars))
        number = self._use.past_calls + self._calls
        return dialect.id_form.format(name=name, number=number, random=random)
