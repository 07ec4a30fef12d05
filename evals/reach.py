"""How many requests a change can touch, as far as that is known before anything is asked.

By what rows and recordings say themselves: prompts over a budget, questions that were asked before.
What only a run can tell, such as guesses that were right, is said to be unknown. Knows no
statistics and starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from evals.item import Item
from evals.pairs import Pair, by_source
from evals.run import Source
from evals.strata import Reach, Told, touched, traces
from policies.hypothesis import Design, Hypothesis
from policies.model_folder import ModelError, find_model
from policies.patching import Configured
from policies.trimming import Trim

if TYPE_CHECKING:
    from cache.tokens import Tokenizer

TURN_TOKENS = 4  # what a template writes around a message, about
TEXT_BYTES_MAX = 50_000_000  # more is not tokenized for a plan
FINDS_OUT = "--from RUN counts them in an earlier run, --exposed SHARE plans for a share"


def assumed(rows: Mapping[str, int], share: float) -> tuple[Reach, ...]:
    """The same share of every source's rows."""
    return tuple(
        Reach(name, count, int(count * share), "asked", "as --exposed says")
        for name, count in rows.items()
    )


def of_pairs(
    hypothesis: Hypothesis, pairs: Sequence[Pair], rows: Mapping[str, int], told: Told, how: str
) -> tuple[Reach, ...]:
    """As many as an earlier run's candidate was touched in, of each source that it asked."""
    fields = traces(hypothesis)
    return tuple(
        Reach(name, rows[name], round(rows[name] * touched(of, fields) / len(of)), told, how)
        for name, of in by_source(pairs).items()
        if name in rows and fields
    )


def of_rows(
    hypothesis: Hypothesis, configured: Sequence[Configured | None], sources: Iterable[Source]
) -> tuple[Reach, ...]:
    """What the rows say themselves, of each source; empty where a change touches every request."""
    fields = traces(hypothesis)
    if not fields:
        return ()
    asked = {one.name: _first_asked(one) for one in sources}
    found: dict[str, Mapping[str, int] | str] = {}
    for name in fields:
        rule = _RULES.get(name)
        why = _UNTOLD.get(name, f"the answers tell which have {name}")
        found[name] = why if rule is None else rule(hypothesis.design, configured, asked)
    unknown = [one for one in found.values() if isinstance(one, str)]
    known = [one for one in found.values() if not isinstance(one, str)]
    reaches = []
    for name, blocks in asked.items():
        rows = sum(map(len, blocks))
        if unknown:
            how = f"{'; '.join(dict.fromkeys(unknown))}; {FINDS_OUT}"
            reaches.append(Reach(name, rows, None, "nobody", how))
        else:
            most = min(rows, sum(one[name] for one in known))
            how = " or ".join(_HOW[field] for field in fields)
            reaches.append(Reach(name, rows, most, "rows", how))
    return tuple(reaches)


_Asked = Mapping[str, Sequence[Sequence[Item]]]  # source -> its blocks, repeats left out
_Rule = Callable[[Design, Sequence[Configured | None], _Asked], Mapping[str, int] | str]


def _first_asked(source: Source) -> list[list[Item]]:
    return [list(block.items) for block in source.blocks if block.repeat == 0]


# ---- prompts over a budget -----------------------------------------------------------------------


def _over_budget(
    _design: Design, configured: Sequence[Configured | None], asked: _Asked
) -> Mapping[str, int] | str:
    """Prompts that either side's trimming can cut, by the model's own tokenizer."""
    sides = [one for one in configured if one is not None]
    if len(sides) < len(configured):
        return "servers at a URL do not tell how they trim"
    trims = [one.deployment.gateway.trim for one in sides]
    budget = min((most for one in trims for most in _budgets(one)), default=None)
    if budget is None:
        return dict.fromkeys(asked, 0)
    tokenizer = _tokenizer(sides[-1])
    if isinstance(tokenizer, str):
        return tokenizer
    # A token has at least a byte: the others need no counting.
    long = {
        name: [item for block in blocks for item in block if _bytes(item) > budget]
        for name, blocks in asked.items()
    }
    if (size := sum(_bytes(item) for items in long.values() for item in items)) > TEXT_BYTES_MAX:
        return f"prompts of {size / 1e6:.0f} MB would have to be tokenized"
    sizes: dict[str, int] = {}
    return {
        name: sum(_tokens(tokenizer, item, sizes) > budget for item in items)
        for name, items in long.items()
    }


def _budgets(trim: Trim) -> list[int]:
    """Of every cut that the policy makes, whichever tier or model."""
    cuts = (trim, *trim.tiers.values(), *trim.models.values())
    return [one.budget_tokens for one in cuts if one.drop != "off"]


def _tokenizer(side: Configured) -> Tokenizer | str:
    runtime = side.deployment.runtime
    if runtime is None:
        return "prompts are counted by the model's tokenizer, which the servers behind have"
    try:
        # What only serving needs is not there in every installation.
        from cache.template import TemplateBroken
        from cache.tokens import Tokenizer, TokenizerUnusable
    except ImportError as error:
        return f"prompts cannot be counted here: {error}"
    try:
        folder = find_model(runtime.model, side.file.absolute().parent)
        if isinstance(folder, Path):
            return Tokenizer.load(folder)
    except (ModelError, TemplateBroken, TokenizerUnusable) as error:
        return f"prompts cannot be counted: {error}"
    return f"prompts are counted by the tokenizer of {folder}, which is not in a folder here"


def _bytes(item: Item) -> int:
    return len(orjson.dumps([item.body.get("messages"), item.body.get("tools")]))


def _tokens(tokenizer: Tokenizer, item: Item, sizes: dict[str, int]) -> int:
    """As gateways count before they cut; turns of one talk have most of their messages in common,
    so that sizes are kept.
    """
    tools = item.body.get("tools")
    texts = [_text(one) for one in item.body.get("messages") or ()]
    texts.append(orjson.dumps(tools).decode() if tools else "")
    for text in texts:
        if text not in sizes:
            sizes[text] = len(tokenizer.encode(text, special=False)) + TURN_TOKENS
    return sum(sizes[text] for text in texts)


def _text(message: Mapping[str, Any]) -> str:
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    content = message.get("content")
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    return text + orjson.dumps(more).decode() if more else text


# ---- asked before --------------------------------------------------------------------------------


def _asked_before(
    design: Design, configured: Sequence[Configured | None], asked: _Asked
) -> Mapping[str, int] | str:
    """Requests that ask what one before them did; with cold blocks, one of the same block."""
    if None in configured:
        return "servers at a URL may have been asked before"
    seen: set[bytes] = set()
    if not design.cold_blocks:  # what warms an arm up is answered, too
        warm = (block for blocks in asked.values() for block in blocks[: design.warmup])
        seen = {_question(item) for block in warm for item in block}
    found = {}
    for name, blocks in asked.items():
        again = 0
        for block in blocks:
            if design.cold_blocks:
                seen = set()
            for item in block:
                question = _question(item)
                again += question in seen
                seen.add(question)
        found[name] = again
    return found


def _question(item: Item) -> bytes:
    parts = [item.body.get(name) for name in ("messages", "prompt", "tools")]
    return orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)


_RULES: Mapping[str, _Rule] = {"trimmed_tokens": _over_budget, "cached_answers": _asked_before}
_HOW: Mapping[str, str] = {
    "trimmed_tokens": "prompts over the budget of a trim",
    "cached_answers": "what another one has asked before",
}
_UNTOLD: Mapping[str, str] = {
    "prompt_tokens": "tool outputs and passages are shortened message by message"
}
