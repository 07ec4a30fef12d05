"""What choosing a replica needs to know over time: rates, work under way, what is cached where.

The choice itself is route.py's, what a replica shows rates.py's. Knows replicas by their URLs, so
that what was learned outlives a change of policy.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from cache.blocks import BLOCK_TOKENS
from cache.prefix_index import CAPACITY_BLOCKS, Mode, PrefixIndex
from gateway.call import Call
from gateway.ladder import Foreseen, Ladder, foresee
from gateway.prompt import Prompt
from gateway.rates import FIRST_S_PER_ANSWER, FIRST_S_PER_TOKEN, Common, Pace, Work
from gateway.receipt import Decision, Receipt, Receipts, new_id
from gateway.replica import Replica
from gateway.route import Ask, Option, decide, delayed, eligible
from gateway.trail import Hop, Trail
from gateway.usage import Usage
from policies.routing import Routing as Policy

SESSIONS_MAX = 8192  # whose last replica is remembered
REPLICAS_MAX = 4096
MODELS_MAX = 64  # whose common beginnings are
HINT_FIELDS = ("prompt_cache_key", "user")
HINT_CHARS_MAX = 256
LEARNED_MIN = 3  # first tokens after which a replica's own rates count
ALIKE = 1.3  # rates that differ by a smaller factor are the same hardware's
CAPACITY_MIN = 64  # blocks
SHRINK, GROW = 0.9, 1.005  # of a capacity: where less was found than foreseen, and where not


@dataclass(slots=True)
class Known:
    """What is known of one replica."""

    pace: Pace = field(default_factory=Pace)
    work: Work = field(default_factory=Work)
    bookings: dict[int, Booking] = field(default_factory=dict)  # without a first token
    capacity_blocks: float = CAPACITY_BLOCKS


class Routing:
    """All replicas. One thread."""

    def __init__(
        self,
        policy: Policy,
        index: PrefixIndex,
        ladder: Ladder,
        tell: Callable[[str, Sequence[bytes], int], None] = lambda _url, _hashes, _known: None,
        before: Routing | None = None,
        delivered: Callable[[str, int, int, int], None] = lambda *_: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Goes on with what `before` has learned. `tell`: other gateways, what was sent where.
        `delivered`: who judges what replicas tell, what one found."""
        self.tell = tell
        self.delivered = delivered
        self.policy = policy
        self.index = index
        self.ladder = ladder
        self.clock = clock
        self.rng = rng or random.Random()  # noqa: S311  # ties between replicas, no secret
        same = before is not None and before.policy.receipts == policy.receipts
        kept = before.receipts if before and same else Receipts(policy.receipts)
        self.receipts: Receipts = kept
        self.turns: int = before.turns if before else 0  # requests that were sent
        self.replicas: dict[str, Known] = before.replicas if before else {}
        self.commons: OrderedDict[str, Common] = before.commons if before else OrderedDict()
        self.sessions: OrderedDict[tuple[str, str], str] = (
            before.sessions if before else OrderedDict()
        )

    def trip(self, call: Call, prompt: Prompt, tier: str, tenant: str) -> Trip:
        """A request that is to be sent somewhere."""
        return Trip(self, call, prompt, tier, tenant)

    def known(self, url: str) -> Known:
        found = self.replicas.get(url)
        if found is None:
            found = self.replicas[url] = Known()
            if len(self.replicas) > REPLICAS_MAX:  # of replicas that come and go
                self.replicas.pop(next(iter(self.replicas)))
        return found

    def common(self, model: str) -> Common:
        found = self.commons.get(model)
        if found is None:
            found = self.commons[model] = Common()
            if len(self.commons) > MODELS_MAX:
                self.commons.popitem(last=False)
        return found

    def way(self, options: Sequence[Known]) -> str:
        """The policy, or what `auto` comes to: once predictions are off for half of the replicas,
        they decide nothing."""
        if self.policy.policy != "auto":
            return self.policy.policy
        wrong = [known.pace.wrong for known in options]
        return "p2c" if 2 * sum(wrong) > len(wrong) else "cost"

    def rates(self, replicas: Sequence[Known]) -> tuple[float, float]:
        """Seconds a token and a running answer of the usual replica, for those not yet known."""
        paces = [known.pace for known in replicas if known.pace.seen >= LEARNED_MIN]
        if not paces:
            return FIRST_S_PER_TOKEN, FIRST_S_PER_ANSWER
        return median(one.s_per_token for one in paces), median(one.s_per_answer for one in paces)

    def report(self) -> Mapping[str, object]:
        """For health answers: what was learned, and how wrong it has been."""
        now = self.clock()
        replicas = {
            url: {
                "prefill_tokens_per_s": round(1 / known.pace.s_per_token, 1),
                "ms_per_request_under_way": round(1000 * known.pace.s_per_answer, 3),
                "first_tokens_seen": known.pace.seen,
                "error_factor": round(known.pace.factor, 3),
                "trusted": not known.pace.wrong,
                "waiting_tokens": round(known.work.waiting_tokens(now, known.pace.s_per_token)),
                "busy": round(known.work.busy(now), 3),
            }
            for url, known in self.replicas.items()
        }
        return {
            "policy": self.policy.policy,
            "replicas": replicas,
        }


class Trip:
    """One request on its way: chooses, books, and learns from what became of it."""

    __slots__ = ("_chosen", "_hint", "_routing", "call", "prompt", "receipt", "trail")

    def __init__(
        self, routing: Routing, call: Call, prompt: Prompt, tier: str, tenant: str
    ) -> None:
        self._routing = routing
        self.call = call
        self.prompt = prompt
        self._hint = session_of(call)
        self.trail: Trail | None = None  # of a request that somebody waits for
        self._chosen: dict[str, tuple[Decision, Foreseen]] = {}
        self.receipt = Receipt(
            new_id(), time.time(), tenant, call.model, tier, prompt.tokens, prompt.exact
        )

    @property
    def clock(self) -> Callable[[], float]:
        return self._routing.clock

    def choose(self, replicas: Iterable[Replica], model: str) -> Replica | None:
        """Whom to send it to; None where nobody can take it. Sends nothing."""
        able = eligible(replicas, model)
        if not able:
            return None
        routing, prompt = self._routing, self.prompt
        now = routing.clock()
        matches = routing.index.match(prompt.hashes, now)
        known = [routing.known(replica.url) for replica in able]
        options = self._options(able, known, matches, now)
        ask = Ask(
            prompt_tokens=prompt.tokens,
            common_tokens=routing.common(model).depth(prompt.hashes) * BLOCK_TOKENS,
            alpha=routing.policy.alpha_of(self.receipt.tier),
            delayed=delayed(sum([option.busy for option in options]) / len(options)),
            policy=routing.way(known),
            draw=routing.rng.random(),
            turn=routing.turns,
            hint=routing.sessions.get((model, self._hint)) if self._hint else None,
        )
        choice = decide(options, ask)
        chosen = able[choice.at]
        seen = foresee(prompt.tokens, matches, {one.url for one in able}, chosen.url)
        self._chosen[chosen.url] = Decision(ask, options, choice), seen
        return chosen

    def _options(
        self,
        able: Sequence[Replica],
        knowns: Sequence[Known],
        matches: Mapping[object, int],
        now: float,
    ) -> tuple[Option, ...]:
        usual = self._routing.rates(knowns)
        options = []
        for replica, known in zip(able, knowns, strict=True):
            pace = known.pace
            per_token, per_answer = usual
            if pace.seen >= LEARNED_MIN:
                per_answer = pace.s_per_answer
                if max(per_token, pace.s_per_token) > ALIKE * min(per_token, pace.s_per_token):
                    per_token = pace.s_per_token
            options.append(
                Option(
                    url=replica.url,
                    in_flight=replica.in_flight + replica.elsewhere.running,
                    waiting_tokens=known.work.waiting_tokens(now, per_token)
                    + replica.elsewhere.tokens,
                    cached_tokens=matches.get(replica.url, 0) * BLOCK_TOKENS,
                    s_per_token=per_token,
                    s_per_answer=per_answer,
                    busy=known.work.busy(now),
                    weight=replica.weight,
                )
            )
        return tuple(options)

    def uncached(self) -> int:
        """Tokens of the prompt that no replica is known to have now."""
        routing, prompt = self._routing, self.prompt
        matches = routing.index.match(prompt.hashes, routing.clock())
        return max(1, prompt.tokens - max(matches.values(), default=0) * BLOCK_TOKENS)

    def foreseen_s(self, replica: Replica) -> float | None:
        """When the first token of a chosen replica is to be expected, from now; None where nobody
        knows, or where what was foreseen of late has been wrong."""
        known = self._routing.known(replica.url)
        pace = known.pace
        if pace.seen < LEARNED_MIN or pace.wrong:
            return None
        _, seen = self._chosen[replica.url]
        waiting = known.work.waiting_tokens(self._routing.clock(), pace.s_per_token)
        return pace.foresee_s(waiting + max(1, seen.prompt - seen.captured), replica.in_flight)

    def book(self, replica: Replica) -> Booking:
        """It is being sent there now."""
        routing = self._routing
        now = routing.clock()
        known = routing.known(replica.url)
        decision, seen = self._chosen[replica.url]
        booking = Booking(self, replica, known, seen, now)
        routing.turns += 1
        self.receipt.decisions.append(decision)
        self.receipt.foreseen = seen
        self.receipt.foreseen_ttft_s = booking.foreseen_s
        self.receipt.error_factor = known.pace.factor
        routing.receipts.keep(self.receipt)
        if self._fits(replica):
            routing.tell(replica.url, self.prompt.hashes, booking.held)
            routing.index.sent(replica.url, self.prompt.hashes, now)
        routing.common(self.call.model).saw(self.prompt.hashes)
        if self._hint:
            routing.sessions[self.call.model, self._hint] = replica.url
            routing.sessions.move_to_end((self.call.model, self._hint))
            if len(routing.sessions) > SESSIONS_MAX:
                routing.sessions.popitem(last=False)
        return booking

    def _fits(self, replica: Replica) -> bool:
        """Whether the replica can compute it at all. What it will refuse is in its cache no sooner
        for having been sent, and would push out what is known of the prompts of others."""
        room = replica.models.get(self.call.model, {}).get("max_model_len")
        return not (self.prompt.exact and isinstance(room, int) and self.prompt.tokens > room)

    def hop(self, replica: Replica) -> Hop | None:
        """What is noted of the request that was booked there."""
        return self.trail.hop(replica, self.receipt) if self.trail is not None else None

    def served(self, booking: Booking, usage: Usage | None) -> None:
        """The answer is complete; `usage` where it says what it took."""
        if booking.ttft_s is None:
            return
        told = usage.cached_tokens if usage else None
        prompt_tokens = usage.prompt_tokens if usage else self.prompt.tokens
        self.receipt.told_prompt_tokens = usage.prompt_tokens if usage else None
        self.receipt.told_cached_tokens = told
        self._routing.ladder.served(booking.seen, prompt_tokens, told)
        if self.call.stream:
            self.receipt.ttft_s = booking.ttft_s
            computed = booking.tokens if told is None else max(1, prompt_tokens - told)
            ahead = booking.ahead + computed
            pace = booking.known.pace
            pace.learn(computed, booking.took_s, ahead, booking.answers, booking.ttft_s)
        if told is not None and not booking.beside:
            self._size(booking, told)
            if self.prompt.exact:
                url = booking.replica.url
                self._routing.delivered(url, booking.told, booking.held, told)

    def _size(self, booking: Booking, told: int) -> None:
        """A replica that has given up what was foreseen holds less than it was thought to."""
        index, known, url = self._routing.index, booking.known, booking.replica.url
        if index.mode(url) is not Mode.APPROXIMATE or not booking.seen.captured:
            return
        lost = booking.seen.captured - told > 2 * BLOCK_TOKENS
        known.capacity_blocks *= SHRINK if lost else GROW
        known.capacity_blocks = min(max(known.capacity_blocks, CAPACITY_MIN), CAPACITY_BLOCKS)
        index.size(url, int(known.capacity_blocks))

    def told(self, url: str) -> int:
        """Blocks of the prompt that an exactly known replica says to have in its pool."""
        index = self._routing.index
        exact = index.mode(url) is Mode.EXACT
        return index.in_pool(self.prompt.hashes).get(url, 0) if exact else 0

    def computing(self, known: Known) -> bool:
        """Whether what is foreseen to be cached there is only just being computed."""
        hashes = self.prompt.hashes
        for other in known.bookings.values():
            depth = min(len(hashes), len(other.hashes))
            if depth > other.held and other.hashes[depth - 1] == hashes[depth - 1]:
                return True
        return False


class Booking:
    """A prompt that was sent to a replica: counts there until its first token."""

    __slots__ = (
        "_clock", "_number", "_over", "ahead", "answers", "began", "beside", "foreseen_s",
        "hashes", "held", "known", "replica", "seen", "tokens", "told", "took_s", "ttft_s",
    )  # fmt: skip

    def __init__(
        self, trip: Trip, replica: Replica, known: Known, seen: Foreseen, now: float
    ) -> None:
        work = known.work
        self._clock = trip.clock
        self._over = False
        self.replica = replica
        self.known = known
        self.seen = seen
        self.began = now
        self.beside = trip.computing(known)
        self.tokens = max(1, seen.prompt - seen.captured)
        self.ahead = work.waiting_tokens(now, known.pace.s_per_token)
        self.answers = replica.in_flight
        self.foreseen_s = known.pace.foresee_s(self.ahead + self.tokens, self.answers)
        self.hashes = trip.prompt.hashes
        self.held = seen.captured // BLOCK_TOKENS
        self.told = min(self.held, trip.told(replica.url))  # of these, by its own word in its pool
        self.ttft_s: float | None = None
        self.took_s = 0.0
        self._number = work.book(self.tokens, now)
        known.bookings[self._number] = self
        replica.waiting_tokens += self.tokens

    def first_token(self) -> None:
        """The answer has begun."""
        if self._over or self.ttft_s is not None:
            return
        now = self._clock()
        self._release(now)
        self.ttft_s = now - self.began
        self.took_s = self.known.work.first_token(self.began, now)
        self.known.work.computed(self.tokens * self.known.pace.s_per_token, now)

    def end(self) -> None:
        """The request has left the replica. Twice is once."""
        if self._over:
            return
        self._over = True
        if self.ttft_s is None:
            self._release(self._clock())

    def _release(self, now: float) -> None:
        self.known.work.release(self._number, now)
        self.known.bookings.pop(self._number, None)
        self.replica.waiting_tokens -= self.tokens


def session_of(call: Call) -> str | None:
    """What the client says that its request belongs to: a hint, nothing that binds."""
    named = call.session(HINT_FIELDS)
    return named[:HINT_CHARS_MAX] if named is not None else None
