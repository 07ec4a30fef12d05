"""What an answer must look like (JSON schema, regex, choice, grammar) -> which tokens may come.

Knows llguidance and one model's vocabulary; knows no requests and no tensors.
Tokens are matched by their exact bytes, so every tokenizer that this project reads will do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from cache.tokens import Tokenizer
from runtime.lark import GrammarRefused, GrammarSpec, lark_of

STACK_BYTES = 2**28
CACHED_MAX = 32  # compiled grammars; the worst of them holds about 20 MB
PROBED_TOKENS = 3
RENEW_MAX_S = 0.05  # what compiled slower is not compiled again between two tokens
REASON_CHARS_MAX = 400
UNSATISFIABLE = "nothing that this model can write satisfies it"

# Measured: a hostile grammar compiles in 1.5 s at most and costs 40 ms a token at most, before it
# is refused.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarFailed(Exception):
    """An answer cannot go on in its grammar, which had compiled well."""


class Grammar:
    """Where one answer stands in its grammar. For one thread at a time."""

    __slots__ = ("_compiled", "_ended", "_matcher", "_tokens")

    def __init__(self, compiled: CompiledGrammar, matcher: LLMatcher) -> None:
        self._compiled = compiled
        self._matcher = matcher
        self._tokens: list[int] = []  # accepted so far, without the end
        self._ended = 0  # end tokens accepted

    @property
    def words(self) -> int:
        """How many words a mask has."""
        return self._compiled.words

    @property
    def may_end(self) -> bool:
        """True when the answer is complete as it stands; an end token is allowed then."""
        return self._matcher.is_accepting()

    @property
    def is_terminated(self) -> bool:
        """True when the answer has ended, or when nothing but its end may follow."""
        return self._ended > 0 or (self._matcher.is_stopped() and not self._matcher.is_error())

    def fill(self, row: NDArray[np.int32]) -> None:
        """Writes the mask of the next token: bit `id % 32` of word `id // 32`, 1 for allowed.

        `row` has `words` words. Raises GrammarFailed.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            self._renew()
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            self._check()

    def accept(self, token: int) -> None:
        """Takes a token that the mask allowed. Raises GrammarFailed for any other."""
        if token in self._compiled.end_ids:
            if not (self._ended or self.may_end):
                raise GrammarFailed("the answer may not end here")
            self._ended += 1
            return
        if self._ended:
            raise GrammarFailed(f"token {token} comes after the end")
        if not self._matcher.consume_token(token):
            self._renew()
            if not self._matcher.consume_token(token):
                raise GrammarFailed(f"token {token} may not come here")
        self._tokens.append(token)

    def allows(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, may come next; nothing changes."""
        ends = self._compiled.end_ids
        if self._ended:
            return 0
        until = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        count: int = self._matcher.validate_tokens(list(tokens[:until]))
        if count < until or until == len(tokens):
            return count
        if count and self._matcher.consume_tokens(list(tokens[:count])):
            may_end = self.may_end
            self._matcher.rollback(count)
        else:
            may_end = count == 0 and self.may_end
        return count + may_end

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens."""
        ends = min(count, self._ended)
        self._ended -= ends
        count -= ends
        if count:
            self._matcher.rollback(count)
            del self._tokens[-count:]
            self._check()

    def _renew(self) -> None:
        """Another matcher at the same place: answers share a table of states, which can be full."""
        try:
            matcher = self._compiled.renew()
        except GrammarRefused as error:
            raise GrammarFailed(str(error)) from error
        if matcher is not None and matcher.consume_tokens(self._tokens):
            self._matcher = matcher
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(_reason(self._matcher.get_error()))


class CompiledGrammar:
    """A grammar over one vocabulary, shared by the answers that follow it. From any thread."""

    def __init__(self, tokens: LLTokenizer, lark: str, end_ids: frozenset[int]) -> None:
        """Raises GrammarRefused."""
        self.end_ids = end_ids
        self.words = (tokens.vocab_size + 31) // 32
        self._tokens = tokens
        self._lark = lark
        started = perf_counter()
        self._first = _on_deep_stack(self._compile)
        self._compile_s = perf_counter() - started

    def begin(self) -> Grammar:
        """The grammar at its start, for one answer."""
        return Grammar(self, self._first.deep_copy())

    def renew(self) -> LLMatcher | None:
        """A matcher that shares nothing with earlier ones; None where that takes too long."""
        if self._compile_s > RENEW_MAX_S:
            return None
        self._first = _on_deep_stack(self._compile)
        return self._first.deep_copy()

    def _compile(self) -> LLMatcher:
        matcher = LLMatcher(self._tokens, self._lark, log_level=0, limits=LIMITS)
        # What is too complex, or empty, shows at the first tokens only.
        ahead = matcher.deep_copy()
        for _ in range(PROBED_TOKENS):
            mask = b"" if ahead.is_error() else ahead.compute_bitmask()
            if ahead.is_error():
                raise GrammarRefused(_reason(ahead.get_error()))
            if not any(mask):
                raise GrammarRefused(UNSATISFIABLE)
            token = _lowest(mask)
            if token in self.end_ids:
                break
            ahead.consume_token(token)
        return matcher


Made = TypeVar("Made")


def _on_deep_stack(make: Callable[[], Made]) -> Made:
    """Runs it in a thread with much stack. Rules that lead to each other are compiled by recursion:
    3,000 in a row overflow the usual 8 MB, which ends the process."""
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is read
            made.set_exception(error)

    usual = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="grammar")
        thread.start()
    finally:
        threading.stack_size(usual)
    return made.result()


def _lowest(mask: bytes) -> int:
    """The lowest id in a mask that is not empty."""
    number = int.from_bytes(mask, "little")
    return (number & -number).bit_length() - 1


class Grammars:
    """Compiles grammars for one model, and remembers the last ones. From any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """`vocabulary` is how many token ids both the tokenizer and the model have."""
        self._end_ids = frozenset(one for one in tokenizer.eos_ids if one < vocabulary)
        self._tokens = _read_vocabulary(tokenizer, vocabulary, self._end_ids)
        self._known: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._compiling = threading.Lock()  # one at a time: the other cores have streams to feed

    def known(self, spec: GrammarSpec) -> CompiledGrammar | None:
        """At no cost, what was compiled before."""
        return self._known.get(spec)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Takes 1 to 10 ms mostly, for a hostile grammar 2 s: keep it out of the event loop.

        Raises GrammarRefused.
        """
        with self._compiling:
            compiled = self._known.pop(spec, None)
            if compiled is None:
                if self._tokens is None:
                    raise GrammarRefused("this model has no end token, so no grammar could end")
                compiled = CompiledGrammar(self._tokens, lark_of(spec), self._end_ids)
            self._known[spec] = compiled
            while len(self._known) > CACHED_MAX:
                self._known.popitem(last=False)
        return compiled


class _Vocabulary:
    """Token ids and their bytes, as llguidance asks for them."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: str) -> list[int]:
        raise AssertionError(f"no grammar here forces text, but {text[:20]!r} was forced")


def _read_vocabulary(
    tokenizer: Tokenizer, vocabulary: int, end_ids: frozenset[int]
) -> LLTokenizer | None:
    """Holds the interpreter's lock for half a second with 150,000 tokens: done while loading."""
    if not end_ids:
        return None
    tokens = [tokenizer.token_bytes(one) for one in range(vocabulary)]
    special = sorted(one for one in tokenizer.special_ids if one < vocabulary)
    ends = sorted(end_ids)
    words = _Vocabulary(tokens, special, ends[0])
    return LLTokenizer(TokenizerWrapper(words), eos_token=ends)


def _reason(error: str) -> str:
    """llguidance's words, without its dumps of grammar and state."""
    text = error.partition("\n<")[0].partition("\n   1 |")[0].strip()
    where, colon, rest = text.partition("): ")
    if colon and where.startswith("at "):
        text = rest
    text = text.removeprefix("failed to compile JSON schema: ")
    if text.startswith("NoExtension"):
        return UNSATISFIABLE
    if len(text) > REASON_CHARS_MAX:  # a regex that it quotes; the trouble is told at the end
        text = f"{text[: REASON_CHARS_MAX // 4]} ... {text[-REASON_CHARS_MAX // 2 :]}"
    return text
