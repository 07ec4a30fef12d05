"""Which replica answers. Pure: numbers in, a choice and its reasons out; the same ones again give
the same choice, bit by bit, which is what `headgate explain` relies on.

    cost = wait + (1 + alpha + delayed + busy) * compute + decode

`wait` is the prefill that was sent there before and has not shown a first token, `compute` what of
the prompt is not cached there, both at the rate that the replica has shown; `decode` what the
requests under way there add. `alpha` and `delayed`, which grows with the load of the fleet, price
the work that others will wait for; `busy`, the share of its time that a replica has computed,
brings new work to those that had less lately. Equal costs go to the least loaded, then to who has
more cached, then by lot.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

DELAYED_MAX = 5.0  # at a load of 0.64: beyond, loads are not known well enough
HINT_S = 0.001  # what a session's last replica may cost more, besides
HINT_SHARE = 0.05  # this part of the least cost
TIE_S, TIE_SHARE = 0.002, 0.01  # costs that differ by no more than both are equal


class Candidate(Protocol):
    """What a replica must be to be asked at all."""

    @property
    def healthy(self) -> bool: ...
    @property
    def models(self) -> Container[str]: ...


C = TypeVar("C", bound=Candidate)


def eligible(replicas: Iterable[C], model: str) -> list[C]:
    """Those that are well and serve the model, adapters being models of their own."""
    return [replica for replica in replicas if replica.healthy and model in replica.models]


@dataclass(slots=True)
class Option:
    """One replica as it stands when a request is to be sent."""

    url: str
    in_flight: float  # a sum of what several gateways tell may be worn by time
    waiting_tokens: float  # of prompts that have no first token yet, what is still to be computed
    cached_tokens: int  # of this prompt, by the index
    s_per_token: float  # of prefill, learned
    s_per_answer: float  # that a request under way adds to a first token, learned
    busy: float  # share of the time it has computed lately, 0 to 1
    weight: float = 1.0


@dataclass(slots=True)
class Ask:
    """What is asked for, and how a replica is to be chosen."""

    prompt_tokens: int
    common_tokens: int  # of its beginning that most prompts share: it soon is everywhere
    alpha: float  # by tier
    delayed: float  # how many others a piece of work delays, by the fleet's load
    policy: str  # cost, p2c, round_robin, least_loaded
    draw: float  # a random number from 0 to 1
    turn: int = 0  # the how manieth choice it is
    hint: str | None = None  # where the session was last


@dataclass(slots=True)
class Terms:
    """Why an option costs what it costs, in seconds."""

    wait_s: float
    compute_s: float
    decode_s: float
    cost_s: float


@dataclass(slots=True)
class Choice:
    at: int  # of the options
    terms: tuple[Terms, ...]


def decide(options: Sequence[Option], ask: Ask) -> Choice:
    """The option to take; there must be one."""
    terms = tuple([price(option, ask) for option in options])
    if len(options) == 1:
        return Choice(0, terms)
    if ask.policy == "round_robin":
        return Choice(ask.turn % len(options), terms)
    if ask.policy == "p2c":
        return Choice(_less_loaded_of_two(options, ask.draw), terms)
    if ask.policy == "least_loaded":
        loads = [_load(option) for option in options]
        least = min(loads)
        tied = [at for at, load in enumerate(loads) if load == least]
        return Choice(_drawn(tied, options, ask.draw), terms)
    costs = [one.cost_s for one in terms]
    least = min(costs)
    if ask.hint is not None:
        most = least + HINT_S + HINT_SHARE * least
        for at, option in enumerate(options):
            if option.url == ask.hint and costs[at] <= most:
                return Choice(at, terms)
    limit = least + TIE_S + TIE_SHARE * least
    ranks = {
        at: (_load(options[at]), -max(options[at].cached_tokens, ask.common_tokens))
        for at, cost in enumerate(costs)
        if cost <= limit
    }
    best = min(ranks.values())
    tied = [at for at, rank in ranks.items() if rank == best]
    return Choice(_drawn(tied, options, ask.draw), terms)


def price(option: Option, ask: Ask) -> Terms:
    """The last token is computed in any case: an answer begins from it."""
    cached = min(max(option.cached_tokens, ask.common_tokens), max(0, ask.prompt_tokens - 1))
    compute_s = (ask.prompt_tokens - cached) * option.s_per_token
    wait_s = option.waiting_tokens * option.s_per_token / option.weight
    decode_s = _load(option) * option.s_per_answer
    cost_s = wait_s + (1 + ask.alpha + ask.delayed + option.busy) * compute_s + decode_s
    return Terms(wait_s, compute_s, decode_s, cost_s)


def delayed(busy: float) -> float:
    """How many others a piece of work delays: those that come until its queue has emptied. In a
    queue with Poisson arrivals, of load b and with times that vary as exponential ones do, that is
    b / (1 - b)^2."""
    return min(busy / max(1 - busy, 1e-3) ** 2, DELAYED_MAX)


def _drawn(tied: Sequence[int], options: Sequence[Option], draw: float) -> int:
    """One of these, by weight: by index, an idle fleet would send everything to its first."""
    if len(tied) == 1:
        return tied[0]
    rest = draw * sum(options[at].weight for at in tied)
    for at in tied:
        rest -= options[at].weight
        if rest < 0:
            return at
    return tied[-1]


def _less_loaded_of_two(options: Sequence[Option], draw: float) -> int:
    """Mitzenmacher, "The power of two choices in randomized load balancing" (2001)."""
    count = len(options)
    if count == 1:
        return 0
    pair = int(draw * count * (count - 1))
    first, second = divmod(min(pair, count * (count - 1) - 1), count - 1)
    second += second >= first
    return first if _load(options[first]) <= _load(options[second]) else second


def _load(option: Option) -> float:
    """Requests under way with this one, for its weight."""
    return (option.in_flight + 1) / option.weight
