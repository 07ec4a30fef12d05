"""What is left out of a conversation that is over its budget, so that the prefix cache stays warm.

Pure. A cut leaves out whole rounds; it moves only when the budget is reached, and then by so much
that the next move is many turns off. It is a function of the conversation alone: asked again, by
any gateway, with the same messages, it is the same cut, and with more messages behind, the same
until the budget is reached again. Knows messages and their sizes, no tokenizer and no HTTP.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from cache.blocks import BLOCK_TOKENS
from policies.trimming import Cutting

Message = Mapping[str, Any]

INSTRUCTIONS = frozenset(("system", "developer"))
RESULTS = frozenset(("tool", "function"))
HEAD_TRIES = 0.75  # the head may be this much of its share where that ends nearer to a block's end


@dataclass(frozen=True, slots=True)
class Cut:
    """Messages [start, end) are left out, and [inner_start, inner_end) of the last round then."""

    start: int
    end: int
    inner_start: int = 0
    inner_end: int = 0

    def leaves_out(self, at: int) -> bool:
        return self.start <= at < self.end or self.inner_start <= at < self.inner_end


NOTHING = Cut(0, 0)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What became of one prompt, in tokens. `again`: of what the last turn had sent, and so had
    left in the cache, what stands behind a cut that moved and is prefilled again. `before` is None
    where nothing was cut, and so not all of the prompt was counted."""

    cut: Cut
    moved: bool
    before_tokens: int | None
    removed_tokens: int
    again_tokens: int
    tool_output_tokens: int = 0  # of those removed, from inside tools' long outputs
    passage_tokens: int = 0  # the same, of passages

    @property
    def round_tokens(self) -> int:
        """The same, of whole rounds."""
        return self.removed_tokens - self.tool_output_tokens - self.passage_tokens

    def shortened(self, tool_output_tokens: int, passage_tokens: int) -> Trimmed:
        """With what had been left out of messages before they were cut."""
        gone = tool_output_tokens + passage_tokens
        return replace(
            self,
            before_tokens=None if self.before_tokens is None else self.before_tokens + gone,
            removed_tokens=self.removed_tokens + gone,
            tool_output_tokens=tool_output_tokens,
            passage_tokens=passage_tokens,
        )


UNCUT = Trimmed(NOTHING, moved=False, before_tokens=None, removed_tokens=0, again_tokens=0)


def trim(
    messages: Sequence[Message],
    sizes: Sequence[int],
    fixed_tokens: int,
    cutting: Cutting,
    cut: Cut | None = None,
) -> Trimmed:
    """`sizes`: tokens of each message as the template writes it; `fixed_tokens`: all else of the
    prompt (tools, generation prompt). `cut`: the last one of this conversation, if it is known."""
    conversation = _Conversation(messages, sizes, fixed_tokens, cutting)
    first = 0 if cut is None else max(cut.end, cut.inner_end)
    before = cut = cut or NOTHING
    previous_ask = 0
    for ask in conversation.asks(first):
        before = cut
        if conversation.size(cut, ask) > cutting.budget_tokens:
            cut = conversation.moved(cut, ask)
        if ask < len(messages):
            previous_ask = ask
    moved = cut != before
    removed = conversation.removed(cut, len(messages))
    again = conversation.behind(cut, previous_ask + 1) if moved and previous_ask else 0
    whole = fixed_tokens + sum(sizes)
    return Trimmed(cut, moved, whole, removed, again)


def apply(messages: Sequence[Message], cut: Cut) -> list[Message]:
    """The messages that stay. Instructions stay wherever they stand."""
    return [
        message
        for at, message in enumerate(messages)
        if not cut.leaves_out(at) or message.get("role") in INSTRUCTIONS
    ]


def mask_tool_output(message: Message, most_chars: int) -> Message:
    """A tool's long output with its middle left out: the same for the same output, every time."""
    content = message.get("content")
    if message.get("role") not in RESULTS or not isinstance(content, str):
        return message
    if len(content) <= most_chars:
        return message
    gone = len(content) - most_chars
    head = most_chars * 2 // 3
    tail = content[len(content) - (most_chars - head) :]
    return {**message, "content": f"{content[:head]}\n[... {gone} characters left out ...]\n{tail}"}


class _Conversation:
    """One conversation with its rounds and sizes."""

    def __init__(
        self, messages: Sequence[Message], sizes: Sequence[int], fixed: int, cutting: Cutting
    ) -> None:
        assert len(messages) == len(sizes)
        self._messages = messages
        self._roles = [str(message.get("role")) for message in messages]
        # Tokens before each message, without and with the instructions that no cut can take.
        self._offset = [0, *accumulate(sizes)]
        loose = (
            0 if role in INSTRUCTIONS else n for role, n in zip(self._roles, sizes, strict=True)
        )
        self._loose = [0, *accumulate(loose)]
        self._fixed = fixed
        self._budget = cutting.budget_tokens
        self._low = int(cutting.budget_tokens * cutting.keep_share)
        self._head_share = cutting.head_share if cutting.drop == "middle" else 0.0
        self._rounds = [at for at in range(len(messages)) if self._begins_round(at)]

    def _begins_round(self, at: int) -> bool:
        return self._roles[at] == "user" and (at == 0 or self._roles[at - 1] != "user")

    def asks(self, first: int) -> Iterator[int]:
        """Where a request was sent: before each answer, and at the end; from message `first` on."""
        for at in range(max(first, 1), len(self._roles)):
            if self._roles[at] == "assistant":
                yield at
        yield len(self._roles)

    def size(self, cut: Cut, ask: int) -> int:
        """Tokens of the prompt of messages[:ask] under a cut."""
        return self._fixed + self._offset[ask] - self.removed(cut, ask)

    def removed(self, cut: Cut, ask: int) -> int:
        outer = self._gone(cut.start, cut.end, ask)
        return outer + self._gone(cut.inner_start, cut.inner_end, ask)

    def _gone(self, start: int, end: int, ask: int) -> int:
        """Tokens of messages[start:end], as far as they come before `ask` and can be left out."""
        return self._loose[min(end, ask)] - self._loose[min(start, ask)]

    def behind(self, cut: Cut, ask: int) -> int:
        """Tokens of messages[:ask] that stay and stand behind what is left out."""
        first = cut.end if cut.end > cut.start else cut.inner_end
        if ask <= first:
            return 0
        inner = self._gone(max(cut.inner_start, first), max(cut.inner_end, first), ask)
        return self._offset[ask] - self._offset[first] - inner

    def moved(self, cut: Cut, ask: int) -> Cut:
        """The next cut: as few rounds more as bring the prompt to the low mark; when all but the
        last round are gone, tool calls of the last round that are over."""
        rounds = [at for at in self._rounds if at < ask]
        if not rounds:
            return self._inner(Cut(cut.start, cut.end), ask, 0)
        start = cut.start if cut.end > cut.start else self._head_end(rounds)
        ends = [at for at in rounds if at >= max(cut.end, start)]
        most = self.size(Cut(start, start), ask) - self._low
        found = bisect_left(ends, most, key=lambda end: self._loose[end] - self._loose[start])
        outer = Cut(start, ends[min(found, len(ends) - 1)]) if ends else cut
        outer = self._keeping_inner(cut, outer)
        if self.size(outer, ask) <= self._budget:
            return outer
        return self._inner(outer, ask, rounds[-1])

    @staticmethod
    def _keeping_inner(cut: Cut, outer: Cut) -> Cut:
        if cut.inner_end <= outer.end:
            return Cut(outer.start, outer.end)
        return Cut(outer.start, outer.end, cut.inner_start, cut.inner_end)

    def _inner(self, cut: Cut, ask: int, last_round: int) -> Cut:
        """Leaves out exchanges of the last round, but for its last one."""
        calls = [at for at in range(last_round, ask) if self._is_call(at)]
        if len(calls) < 2:
            return cut
        start = cut.inner_start if cut.inner_end else calls[0]
        ends = [at for at in calls[1:] if at > max(start, cut.inner_end)]
        if not ends:
            return cut
        outer = Cut(cut.start, cut.end)
        most = self.size(outer, ask) - self._low
        found = bisect_left(ends, most, key=lambda end: self._loose[end] - self._loose[start])
        return Cut(cut.start, cut.end, start, ends[min(found, len(ends) - 1)])

    def _is_call(self, at: int) -> bool:
        message = self._messages[at]
        called = message.get("tool_calls") or message.get("function_call")
        return self._roles[at] == "assistant" and bool(called)

    def _head_end(self, rounds: Sequence[int]) -> int:
        """Where a first cut begins: behind the head, as near to a block's end as can be."""
        first = self._offset[rounds[0]]
        room = self._head_share * (self._low - self._fixed - first)
        fitting = [at for at in rounds if self._offset[at] - first <= room] or rounds[:1]
        full = [at for at in fitting if self._offset[at] - first >= room * HEAD_TRIES]
        if not full:
            return fitting[-1]
        return min(full, key=lambda at: ((self._fixed + self._offset[at]) % BLOCK_TOKENS, -at))
