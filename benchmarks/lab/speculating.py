"""Engines that guess in different ways over one model, and what each makes of the same requests.

Imports the engine, and so torch: only those who measure it import this module, and late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.lab.open_loop import ComputeClock
from benchmarks.lab.samples import percentile
from cache.tokens import Tokenizer
from runtime.calibrate import measure_costs
from runtime.draft_writer import ModelWriter, SelfWriter
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.lean import lean_step
from runtime.loading import load_model
from runtime.model import Model
from runtime.self_model import LayersModel
from runtime.sequence import Sampling
from runtime.speculation import Mode, Modes, Speculation
from runtime.vocabulary import Vocabulary
from spec_decode.draft import Proposer
from spec_decode.draft_model import DraftModel
from spec_decode.ngram import NGram
from spec_decode.prediction import Prediction
from spec_decode.self_draft import kept_layers
from spec_decode.tree import Tree

_KV_TOKENS = 32768
_TIMED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Way:
    """A way of guessing: whom `auto` may ask, or who always guesses `most` tokens."""

    name: str
    proposer: str
    most: int
    made_of: tuple[str, ...]


OFF = Way("off", "off", 1, ())
WAYS = (
    OFF,
    Way("ngram 3", "ngram", 3, ("ngram",)),
    Way("ngram 7", "ngram", 7, ("ngram",)),
    Way("tree 7", "tree", 7, ("tree",)),
    Way("draft 3", "draft", 3, ("draft",)),
    Way("draft 5", "draft", 5, ("draft",)),
    Way("self 3", "self", 3, ("self",)),
    Way("auto", "auto", 7, ("prediction", "ngram")),
    Way("auto with draft", "auto", 7, ("prediction", "ngram", "draft")),
)


class Bench:
    """A target, its draft, and an engine for each way of guessing. Time is computing time."""

    def __init__(self, target: Path, draft: Path | None, *, compiles: bool) -> None:
        self.model, folder = load_model(
            target, kv_tokens=_KV_TOKENS, device="cpu", dtype="fp32", compiles=compiles
        )
        self.tokenizer = Tokenizer.load(folder)
        self._draft = draft
        self._compiles = compiles

    def engine(self, way: Way, *, max_sequences: int = 32) -> Engine:
        clock = ComputeClock()
        engine = Engine(
            self.model,
            self.tokenizer,
            emit=lambda _: None,
            step_tokens=2048,
            max_sequences=max_sequences,
            speculation=self._speculation(way),
            now=clock,
            timer=clock,
        )
        engine.calibrate(2.0)
        return engine

    def _speculation(self, way: Way) -> Speculation | None:
        if way is OFF:
            return None
        proposers = [self._proposer(name) for name in way.made_of]
        return Speculation(proposers, Modes(Mode(way.proposer, way.most)), timer=ComputeClock())

    def _proposer(self, name: str) -> Proposer:
        if name == "ngram":
            return NGram()
        if name == "tree":
            return Tree(0)
        if name == "prediction":
            return Prediction()
        same = Vocabulary(self.model.vocab_size)
        clock = ComputeClock()
        if name == "self":
            fewer = LayersModel(self.model, kept_layers(len(self.model.windows), 0.5))
            costs = measure_costs(fewer, _TIMED_TOKENS, 32, budget_s=0.5, timer=clock)
            writer = SelfWriter(fewer, self.model.blocks, costs, same, timer=clock)
            return DraftModel(writer, "self")
        assert self._draft is not None
        draft: Model
        draft, _ = load_model(
            self._draft, kv_tokens=_KV_TOKENS, device="cpu", dtype="fp32", compiles=self._compiles
        )
        if draft.decoder is None:
            draft.decoder = lean_step(draft)
        costs = measure_costs(draft, _TIMED_TOKENS, 32, budget_s=0.5, timer=clock)
        return DraftModel(ModelWriter(draft, self.model.blocks, costs, same, timer=clock))


@dataclass(slots=True)
class Told:
    """What became of the requests of one run."""

    token_s: list[list[float]] = field(default_factory=list)  # of each, when its tokens came
    came_s: list[float] = field(default_factory=list)
    took_s: float = 0.0
    steps: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_s))

    def figures(self) -> dict[str, float]:
        """Tokens a second in all and behind first tokens; times to the first and between tokens."""
        firsts = [one[0] - came for one, came in zip(self.token_s, self.came_s, strict=True)]
        tails = [one for one in self.token_s if len(one) > 1]
        means = [(one[-1] - one[0]) / (len(one) - 1) for one in tails]
        decode_s = sum(one[-1] - one[0] for one in tails)
        told = {
            "tok_s": self.tokens / self.took_s,
            "decode_tok_s": sum(len(one) - 1 for one in tails) / decode_s,
            "ttft_p50_ms": 1e3 * median(firsts),
            "tpot_p50_ms": 1e3 * median(means),
            "tpot_p99_ms": 1e3 * percentile(means, 99),
            "tokens_a_step": self.tokens / self.steps,
        }
        return told | ({"acceptance": self.accepted / self.guessed} if self.guessed else {})


def serve_closed(
    engine: Engine, prompts: Many[list[int]], sampling: Sampling, together: int
) -> Told:
    """All prompts, so many at once: the next begins when one has ended."""
    clock: Callable[[], float] = engine.now
    engine.forget_cached()  # another engine has used the blocks meanwhile
    told = Told([[] for _ in prompts], [0.0] * len(prompts))
    numbers: dict[int, int] = {}
    coming = list(enumerate(prompts))[::-1]
    began, steps = clock(), engine.clock.steps
    guessed, accepted = _guesses(engine)
    while coming or numbers:
        while coming and len(numbers) < together:
            number, prompt = coming.pop()
            numbers[engine.submit([Order(prompt, sampling)])[0]] = number
            told.came_s[number] = clock()
        engine.take_orders(wait=False)
        outputs = engine.step()
        now = clock()
        for output in outputs:
            assert output.error is None, output.error
            told.token_s[numbers[output.key]] += [now] * len(output.token_ids)
            if output.finish_reason:
                del numbers[output.key]
    told.took_s = clock() - began
    told.steps = engine.clock.steps - steps
    told.guessed, told.accepted = (
        now - before for now, before in zip(_guesses(engine), (guessed, accepted), strict=True)
    )
    return told


def _guesses(engine: Engine) -> tuple[int, int]:
    if engine.speculation is None:
        return 0, 0
    return engine.speculation.counts.guessed, engine.speculation.counts.accepted


def acceptance(engine: Engine) -> dict[str, float]:
    """Of all that an engine has guessed so far."""
    if engine.speculation is None or not engine.speculation.counts.guessed:
        return {}
    counts = engine.speculation.counts
    return {
        "acceptance": counts.accepted / counts.guessed,
        "accepted_a_draft": counts.accepted / counts.drafts,
    }
