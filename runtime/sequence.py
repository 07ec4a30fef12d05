"""One sequence on its way from prompt to answer: its tokens, its blocks, its text, its end.

Knows nothing of batches, of scheduling or of HTTP. The engine's thread alone touches it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from cache.text import Detokenizer, StopScanner
from cache.tokens import Tokenizer
from runtime.shapes import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy; `logprobs` counts
    alternatives per token, None for no logprobs at all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def greedy(self) -> bool:
        # Below this, dividing by the temperature overflows before it changes a choice.
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one sequence, in the order of steps."""

    key: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is prompt then answer; `computed` of them have their keys and values in `blocks`."""

    key: int
    prompt: Ids[int]
    sampling: Sampling
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    rng: random.Random | None = field(init=False)
    prompt_scored: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.rng = None if self.sampling.greedy else random.Random(self.sampling.seed)  # noqa: S311 - sampling, not secrets

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def behind(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 for a plain decode."""
        return len(self.tokens) - self.computed

    def forget_blocks(self) -> list[int]:
        """The blocks, no longer this sequence's; it will be computed again from the start."""
        blocks, self.blocks = self.blocks, []
        self.computed = 0
        return blocks


class Reply:
    """Turns a sequence's sampled tokens into text that may leave, and knows when it has ended."""

    def __init__(self, tokenizer: Tokenizer, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self._detokenizer = Detokenizer(tokenizer, sequence.prompt)
        self._scanner = StopScanner(sampling.stop) if sampling.stop else None
        self._ends = sampling.stop_ids
        if not sampling.ignore_eos:
            self._ends = self._ends | tokenizer.eos_ids
        self._sequence = sequence
        self._pending: list[TokenLogprob] = []
        self._scored = Detokenizer(tokenizer) if sampling.prompt_logprobs else None
        self._scored_chars = 0
        self.chars = 0  # of the answer so far, those of stop strings too

    def prompt_offset(self, token: int) -> int:
        """Where in the prompt's text its next scored token begins, in characters."""
        assert self._scored is not None, "only prompts that are scored have offsets"
        offset = self._scored_chars
        self._scored_chars += len(self._scored.push(token))
        return offset

    def push(self, token: int, logprob: TokenLogprob | None) -> Output:
        """The visible effect of one more token. An end token and a stop string leave no text."""
        sequence = self._sequence
        if logprob is not None:
            self._pending.append(logprob)
        if token in self._ends:
            return self._end("stop", token, self._flush())
        text = self._detokenizer.push(token)
        self.chars += len(text)
        if self._scanner is not None and text:
            text, hit = self._scanner.push(text)
            if hit:
                return self._end("stop", token, text)
        if sequence.answer_tokens >= sequence.sampling.max_tokens:
            return self._end("length", token, text + self._flush())
        return self._output(token, text, None)

    def _flush(self) -> str:
        """What was held back: an unfinished character, the beginning of a stop string."""
        text = self._detokenizer.finish()
        if self._scanner is None:
            return text
        head, hit = self._scanner.push(text) if text else ("", False)
        return head if hit else head + self._scanner.flush()

    def _end(self, reason: FinishReason, token: int, text: str) -> Output:
        return self._output(token, text, reason)

    def _output(self, token: int, text: str, reason: FinishReason | None) -> Output:
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._pending and (text or reason):
            logprobs = tuple(self._pending)
            self._pending.clear()
        return Output(self._sequence.key, text, (token,), logprobs, reason)
