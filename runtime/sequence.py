"""One sequence on its way from prompt to answer: its tokens, its blocks, its text, its end.

Knows nothing of batches, of scheduling or of HTTP. The engine's thread alone touches it.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache.blocks import BLOCK_TOKENS, chain_hashes
from cache.text import Detokenizer, StopScanner
from cache.tokens import Tokenizer
from runtime.adjust import Adjustment, adjustment
from runtime.grammar import CompiledGrammar
from runtime.kv import BlockKey
from runtime.shapes import FinishReason, TokenLogprob
from runtime.token_ledger import Counts

if TYPE_CHECKING:
    from runtime.tracing import Track

# How long a request of one priority class waits before it overtakes newer ones of the class above.
AGING_S = 30.0
# A request that names no target is due when its prompt alone would be done, and this much later.
DEFAULT_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy; `logprobs` counts
    alternatives per token, None for no logprobs at all. What changes the logits is in adjust.py."""

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
    shown_ids: frozenset[int] = frozenset()  # special tokens that leave their text all the same
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: CompiledGrammar | None = None

    @property
    def adjusts(self) -> bool:
        """True when the logits are to be changed before a token is chosen."""
        penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalized or self.logit_bias or self.grammar)

    @property
    def greedy(self) -> bool:
        # Below this, dividing by the temperature overflows before it changes a choice.
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Service:
    """What a request asks of the scheduler. Lower priorities come first, 0 is usual, as in vLLM.

    `ttft_s` and `tpot_s` are targets that chunking and order aim at; after `deadline_s` the request
    is given up. `tier` and `route` are names that the gateway gives: what is guessed for answers
    of one may be learned from others of it.
    """

    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    tier: str = ""
    route: str = ""
    request_id: str = ""  # for the log


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one sequence, in the order of steps."""

    key: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    error_code: str = "engine_error"
    cached_tokens: int = 0  # of the prompt, found instead of computed; the same in every output
    accepted_tokens: int = 0  # guesses of this step that were right
    rejected_tokens: int = 0  # and that were not


@dataclass(slots=True)
class Times:
    """Seconds on the engine's clock; None for what has not happened yet."""

    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is prompt then answer; `computed` of them have their keys and values in `blocks`.

    The last `begun` tokens of the prompt are the beginning of the answer, said by another worker:
    what comes is drawn, penalized and stopped as if it had been said here.
    `hashes` has one for each full block of `tokens`, as far as they are known yet; the first
    `sealed` blocks can be found by others and are never written again.
    """

    key: int
    prompt: Ids[int]
    sampling: Sampling
    service: Service = Service()
    root: bytes = b""
    adapter: str | None = None
    salt: str | None = None
    times: Times = field(default_factory=Times)
    counts: Counts = field(default_factory=Counts, kw_only=True)
    prediction: Ids[int] = ()  # what the client expects the answer to be
    begun: int = 0
    ends: frozenset[int] = frozenset()  # tokens behind which nothing of the answer follows
    tokens: list[int] = field(init=False)
    hashes: list[bytes] = field(init=False)
    alone_s: float = 0.0  # what its prompt takes when nothing else runs, 0 where nobody knows
    computed: int = 0
    cached: int = 0  # prompt tokens that were found when the sequence was first admitted
    sealed: int = 0
    blocks: list[int] = field(default_factory=list)
    rng: random.Random | None = field(init=False)
    thrown: list[float] = field(default_factory=list)  # numbers of `rng` for the next tokens
    adjustment: Adjustment | None = field(init=False)
    proposed: int = 0  # tokens guessed for it, each of which the next step verifies
    prompt_scored: int = 0
    preemptions: int = 0
    waits_for: str = "capacity"  # or "prefix", which another one computes, or "tier"
    track: Track | None = None  # of a request that is traced

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.hashes = chain_hashes(self.root, self.prompt)
        asked, said = self.parts()
        self.adjustment = adjustment(self.sampling, asked)
        self.rng = None if self.sampling.greedy else random.Random(self.sampling.seed)  # noqa: S311 - sampling, not secrets
        for token in said:
            self.throw()
            if self.adjustment is not None:
                self.adjustment.push(token)

    @property
    def rank(self) -> tuple[float, int]:
        """Who comes first: the lower one. It never changes, so waiting alone brings one forward.

        Priority counts as `AGING_S` a class, so that nobody is overtaken for ever; within a class
        the one whose first token is due first, then the one that came first. So the shorter of two
        prompts comes first, unless it came later by more than the longer one takes.
        """
        return self.due_s + self.service.priority * AGING_S, self.key

    @property
    def seniority(self) -> tuple[float, int]:
        """`rank` as if all prompts took equally long."""
        rank, key = self.rank
        return rank if self.service.ttft_s else rank - self.alone_s, key

    @property
    def due_s(self) -> float:
        """When its first token should leave."""
        return self.times.arrived + (self.service.ttft_s or DEFAULT_WAIT_S + self.alone_s)

    def throw(self) -> float | None:
        """The uniform number that the next token is drawn by; None where none is drawn.

        However many tokens are guessed ahead, the answer's n-th token is drawn by the n-th number.
        """
        if self.rng is None:
            return None
        return self.thrown.pop(0) if self.thrown else self.rng.random()

    def peek(self, at: int) -> float | None:
        """The number of the token `at` places behind the next one."""
        if self.rng is None:
            return None
        while len(self.thrown) <= at:
            self.thrown.append(self.rng.random())
        return self.thrown[at]

    @property
    def group(self) -> Hashable:
        """Only sequences of one group may read each other's text."""
        return self.service.tier, self.adapter, self.salt

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def asked_tokens(self) -> int:
        """The prompt's, without what of it is answer."""
        return len(self.prompt) - self.begun

    def parts(self) -> tuple[Ids[int], Ids[int]]:
        """What was asked, and what of the answer had been said elsewhere."""
        if not self.begun:
            return self.prompt, ()
        return self.prompt[: self.asked_tokens], self.prompt[self.asked_tokens :]

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def needed_from(self) -> int:
        """The first position that has to be computed, however much is found: the last token, whose
        row gives the next one, or the first whose row scores a prompt token."""
        if self.sampling.prompt_logprobs and self.prompt_scored < self.prompt_tokens:
            return max(0, self.prompt_scored - 1)
        return len(self.tokens) - 1

    @property
    def behind(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 for a plain decode."""
        return len(self.tokens) - self.computed

    def cut_blocks(self, keep: int) -> list[int]:
        """The blocks behind the first `keep`, no longer this sequence's."""
        gone = self.blocks[keep:]
        del self.blocks[keep:]
        self.computed = min(self.computed, keep * BLOCK_TOKENS)
        self.sealed = min(self.sealed, keep)
        return gone

    def newly_full(self) -> tuple[list[int], list[BlockKey]]:
        """Blocks that are full and computed but not sealed yet, with what they are known by."""
        first, full = self.sealed, self.computed // BLOCK_TOKENS
        if first >= full:
            return [], []
        self.sealed = full
        known = len(self.hashes)
        if known < full:
            parent = self.hashes[-1] if known else self.root
            behind = self.tokens[known * BLOCK_TOKENS : full * BLOCK_TOKENS]
            self.hashes += chain_hashes(parent, behind)
        return self.blocks[first:full], self.keys(first, full)

    def keys(self, first: int, end: int) -> list[BlockKey]:
        """What blocks `first` to `end` are known by; their hashes are known."""
        return [self._key(at) for at in range(first, end)]

    def _key(self, at: int) -> BlockKey:
        tokens = tuple(self.tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS])
        parent = self.hashes[at - 1] if at else None
        return BlockKey(self.hashes[at], parent, tokens, self.adapter, self.salt)


class Reply:
    """Turns a sequence's sampled tokens into text that may leave, and knows when it has ended.

    The sequence learns which tokens end it.
    """

    def __init__(self, tokenizer: Tokenizer, sequence: Sequence) -> None:
        sampling = sequence.sampling
        asked, said = sequence.parts()
        self._detokenizer = Detokenizer(tokenizer, asked, shown=sampling.shown_ids)
        self._scanner = StopScanner(sampling.stop) if sampling.stop else None
        sequence.ends = sampling.stop_ids
        if not sampling.ignore_eos:
            sequence.ends |= tokenizer.eos_ids
        self._sequence = sequence
        self._pending: list[TokenLogprob] = []
        self._scored = Detokenizer(tokenizer) if sampling.prompt_logprobs else None
        self._scored_chars = 0
        self.chars = 0  # of the answer so far, those of stop strings too
        for token in said:
            self._show(token)

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
        if token in sequence.ends:
            return self._end("stop", token, self._flush())
        text, hit = self._show(token)
        if hit:
            return self._end("stop", token, text)
        if sequence.answer_tokens >= sequence.sampling.max_tokens:
            return self._end("length", token, text + self._flush())
        return self._output(token, text, None)

    def _show(self, token: int) -> tuple[str, bool]:
        """The text that may leave now, and whether a stop string was met."""
        text = self._detokenizer.push(token)
        self.chars += len(text)
        return self._scanner.push(text) if self._scanner is not None and text else (text, False)

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
        cached = min(self._sequence.cached, self._sequence.asked_tokens)
        self._sequence.counts.emitted += 1
        return Output(self._sequence.key, text, (token,), logprobs, reason, cached_tokens=cached)
