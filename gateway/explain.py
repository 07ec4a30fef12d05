"""`python -m gateway.explain`: receipts as JSON on stdin -> the same decisions again, and why.

Run by `headgate explain`. Needs no gateway: a receipt holds all that its decisions were made of.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import orjson

from gateway.route import Ask, Choice, Option, Terms, decide
from policies.load import PolicyError, load
from policies.routing import Routing


@dataclass(frozen=True, slots=True)
class Again:
    """One decision, as it was made and as it comes out now."""

    options: tuple[Option, ...]
    ask: Ask
    was: Choice
    now: Choice

    @property
    def same(self) -> bool:
        return self.was == self.now


class NoReceipt(Exception):
    """The input is not what the gateway tells."""


def decide_again(receipt: Mapping[str, Any], routing: Routing | None = None) -> list[Again]:
    """Every decision of a receipt, by its own policy or by another. Raises NoReceipt."""
    try:
        decisions = [_parse(one) for one in receipt["decisions"]]
        tier = str(receipt["tier"])
    except (KeyError, TypeError) as error:
        raise NoReceipt(f"this is no receipt: {error}") from None
    again = []
    for options, made, was in decisions:
        ask = made if routing is None else _by(made, routing, tier)
        again.append(Again(options, ask, was, decide(options, ask)))
    return again


def _parse(told: Mapping[str, Any]) -> tuple[tuple[Option, ...], Ask, Choice]:
    options = tuple(Option(**one) for one in told["options"])
    terms = tuple(Terms(**one) for one in told["choice"]["terms"])
    return options, Ask(**told["ask"]), Choice(told["choice"]["at"], terms)


def _by(ask: Ask, routing: Routing, tier: str) -> Ask:
    """The same request under another policy; `auto` is what it comes to while rates hold."""
    way = "cost" if routing.policy == "auto" else routing.policy
    return replace(ask, policy=way, alpha=routing.alpha_of(tier))


# ---- what a person reads ------------------------------------------------------------------------


def table(receipt: Mapping[str, Any], decisions: Sequence[Again]) -> list[str]:
    """One receipt."""
    exact = "exact" if receipt["exact"] else "by bytes"
    lines = [
        f"{receipt['id']}  {receipt['model']}  tier {receipt['tier']}  "
        f"{receipt['prompt_tokens']} prompt tokens ({exact})"
    ]
    if (left := receipt.get("trimmed")) is not None:
        lines += _left_out(left)
    for number, one in enumerate(decisions, start=1):
        ask = one.ask
        lines += [
            "",
            f"decision {number}: {ask.policy}, alpha {ask.alpha:g}, {ask.common_tokens} tokens of "
            f"the beginning are common" + (f", session was at {ask.hint}" if ask.hint else ""),
            *_rows(one),
            "the same choice comes out, to the last bit"
            if one.same
            else f"NOW {one.options[one.now.at].url}, THEN {one.options[one.was.at].url}",
        ]
    attempts = [f"{one['url']} {one['outcome']}" for one in receipt["attempts"]]
    lines += ["", "attempts: " + (", ".join(attempts) or "none")]
    if receipt["ttft_s"] is not None:
        lines.append(
            f"first token: foreseen {_ms(receipt['foreseen_ttft_s'])}, came after "
            f"{_ms(receipt['ttft_s'])}; predictions there were off by a factor of "
            f"{receipt['error_factor']:.2f}"
        )
    if (seen := receipt["foreseen"]) is not None:
        told = receipt["told_cached_tokens"]
        lines.append(
            f"cached tokens: {seen['anywhere']} known anywhere, {seen['available']} where it could "
            f"be sent, {seen['captured']} where it was sent, "
            + ("not told by the replica" if told is None else f"{told} found")
        )
    return lines


def _left_out(left: Mapping[str, Any]) -> list[str]:
    """What trimming did before anything was decided."""
    cut = left["cut"]
    spans = [(cut["start"], cut["end"]), (cut["inner_start"], cut["inner_end"])]
    gone = " and ".join(f"{start} to {end - 1}" for start, end in spans if end > start)
    rules = [
        ("drop", left["round_tokens"], f" (messages {gone})" if gone else ""),
        ("tool_output_chars", left["tool_output_tokens"], ""),
        ("passages", left["passage_tokens"], ""),
    ]
    by = ", ".join(f"{tokens} by {name}{where}" for name, tokens, where in rules if tokens)
    again = f"; {left['again_tokens']} prefilled again" if left["again_tokens"] else ""
    return [
        f"trimmed from {left['before_tokens']} to {left['after_tokens']} tokens: "
        f"{by or 'nothing that counts'}{again}"
    ]


def _rows(one: Again) -> list[str]:
    head = ("", "replica", "cached", "waiting", "under way", "wait", "compute", "decode", "cost")
    rows: list[tuple[str, ...]] = [head]
    for at, (option, terms) in enumerate(zip(one.options, one.now.terms, strict=True)):
        rows.append(
            (
                "->" if at == one.now.at else "",
                option.url,
                str(option.cached_tokens),
                f"{option.waiting_tokens:.0f}",
                str(option.in_flight),
                *map(_ms, (terms.wait_s, terms.compute_s, terms.decode_s, terms.cost_s)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def summary(all_of_them: Iterable[tuple[Mapping[str, Any], list[Again]]]) -> dict[str, Any]:
    """Many receipts: where they went and would go, and what each decision was foreseen to cost."""
    pairs = [(one.options, one.was, one.now) for _, again in all_of_them for one in again]
    if not pairs:
        return {"decisions": 0}
    was = Counter(options[choice.at].url for options, choice, _ in pairs)
    now = Counter(options[choice.at].url for options, _, choice in pairs)
    first_s = [
        (_first_s(then.terms[then.at]), _first_s(then.terms[other.at])) for _, then, other in pairs
    ]
    cached = [(options[a.at].cached_tokens, options[b.at].cached_tokens) for options, a, b in pairs]
    return {
        "decisions": len(pairs),
        "changed": sum(then.at != other.at for _, then, other in pairs),
        "share": {url: [was[url] / len(pairs), now[url] / len(pairs)] for url in {**was, **now}},
        "foreseen_first_token_s": [mean(a for a, _ in first_s), mean(b for _, b in first_s)],
        "cached_tokens": [sum(a for a, _ in cached), sum(b for _, b in cached)],
    }


def _first_s(terms: Terms) -> float:
    return terms.wait_s + terms.compute_s + terms.decode_s


def main(arguments: Sequence[str] | None = None) -> int:
    """0: as it was, or by another policy; 1: something came out differently; 2: wrong input."""
    parser = argparse.ArgumentParser(prog="python -m gateway.explain", description=__doc__)
    parser.add_argument("--policy", type=Path, default=None, help="decide by this policy instead")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    options = parser.parse_args(arguments)
    try:
        routing = load(options.policy).gateway.routing if options.policy else None
        told = orjson.loads(sys.stdin.buffer.read())
        whole = told if isinstance(told, dict) and "data" in told else {"data": [told]}
        done = [(receipt, decide_again(receipt, routing)) for receipt in whole["data"]]
    except (PolicyError, NoReceipt, orjson.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(orjson.dumps({"summary": summary(done), "receipts": _json(done)}).decode())
    else:
        for receipt, again in done[-20:] if len(done) > 1 else done:
            print("\n".join(table(receipt, again)), end="\n\n")
        if len(done) > 1:
            print("\n".join(_told(summary(done))))
    same = all(one.same for _, again in done for one in again)
    return 0 if same or routing is not None else 1


def _json(done: Iterable[tuple[Mapping[str, Any], list[Again]]]) -> list[dict[str, Any]]:
    return [
        {
            "id": receipt["id"],
            "decisions": [
                {
                    "same": one.same,
                    "was": one.options[one.was.at].url,
                    "now": one.options[one.now.at].url,
                    "terms": [asdict(terms) for terms in one.now.terms],
                }
                for one in again
            ],
        }
        for receipt, again in done
    ]


def _told(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{facts['decisions']} decisions, {facts.get('changed', 0)} come out differently"]
    for url, (was, now) in facts.get("share", {}).items():
        lines.append(f"  {url}  {was:.1%} then, {now:.1%} now")
    if "cached_tokens" in facts:
        was, now = facts["cached_tokens"]
        lines.append(f"cached tokens where sent: {was} then, {now} now")
        was, now = facts["foreseen_first_token_s"]
        lines.append(f"first token foreseen, mean: {_ms(was)} then, {_ms(now)} now")
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no error
    sys.exit(main())
