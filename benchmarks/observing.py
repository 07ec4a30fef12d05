"""What it costs to be observed: metrics counted, block events sent, subscribers of every kind.

One engine in one process, without a server; variants take turns, so that a busy machine is busy for
all of them. CPU time is that of the whole process, threads of events and subscribers included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.lab.report import About, Goal, Measured, Settings, run

if TYPE_CHECKING:
    from benchmarks.lab.engine_steps import Loaded
    from runtime.events import BlockEvents

ABOUT = About(
    name="observing",
    measures=(
        "An engine decodes 16 sequences of the pocket model, behind prompts of 64 tokens, with "
        "nobody listening, with metrics, and with metrics and block events: without a subscriber, "
        "with one that reads, with one that does not read, and with one that asks for replays all "
        "the time. Variants take turns; each number is the median of ratios to the run with nobody "
        "listening in the same turn, with one torch thread: of a step's time, of the CPU time of "
        "the engine's thread, and of the whole process. Counting alone is timed on sequences "
        "without a model, and a page of metrics is written many times, both in CPU time."
    ),
    goals=(
        Goal("metrics_step_us", 20.0, "at most", "metrics cost at most 20 us a step at 64 answers"),
        Goal("page_ms", 20.0, "at most", "a page of metrics is written in 20 ms"),
    ),
)
_SEQUENCES = 16
_PROMPT, _ANSWER = 64, 64


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's work from the first order to the last token."""

    step_us: float  # median of all steps
    engine_s: float  # CPU time of the engine's thread
    cpu_s: float  # of the whole process


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    import torch

    from benchmarks.lab.engine_steps import load
    from policies.model_folder import pocket_folder

    turns = 2 if settings.quick else 7
    loaded = load(pocket_folder())
    torch.set_num_threads(1)  # the engine's thread then has all of the forward's CPU time
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    for turn in range(turns + 1):
        for name, variant in VARIANTS.items():
            with variant() as (events, more):
                made = _decode(loaded, events, metrics=more)
            if turn:  # the first one warms up
                runs[name].append(made)
        settings.progress(f"turn {turn} of {turns}")
    alone = runs["nobody"]
    results: dict[str, Any] = {
        f"{name}_{what}_ratio": round(
            median(
                getattr(one, what) / getattr(base, what)
                for one, base in zip(made, alone, strict=True)
            ),
            4,
        )
        for name, made in runs.items()
        if name != "nobody"
        for what in ("step_us", "engine_s", "cpu_s")
    }
    results["nobody_step_us"] = round(median(one.step_us for one in alone), 1)
    results |= {f"metrics_step_us_{count}": _counting_us(loaded, count) for count in (1, 16)}
    results["metrics_step_us"] = _counting_us(loaded, 64)
    results |= _page(loaded)
    values = {goal.name: results[goal.name] for goal in ABOUT.goals}
    return Measured(results, values, {"sequences": _SEQUENCES, "turns": turns})


# ---- variants -----------------------------------------------------------------------------------

Variant = tuple["BlockEvents | None", bool]


@contextmanager
def _nobody() -> Iterator[Variant]:
    yield None, False


@contextmanager
def _metrics() -> Iterator[Variant]:
    yield None, True


@contextmanager
def _events(subscribe: Callable[[ExitStack, BlockEvents], None]) -> Iterator[Variant]:
    from policies.schema import KvEvents
    from runtime.events import BlockEvents

    settings = KvEvents(
        endpoint="tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:0", hwm=100, buffer_steps=500
    )
    with ExitStack() as stack:
        events = stack.enter_context(closing(BlockEvents(settings)))
        subscribe(stack, events)
        yield events, True


def _no_subscriber(_stack: ExitStack, _events: BlockEvents) -> None:
    return


def _subscriber(*, reads: bool, replays: bool) -> Callable[[ExitStack, BlockEvents], None]:
    """A process of its own, because a router is one."""
    import subprocess

    def subscribe(stack: ExitStack, events: BlockEvents) -> None:
        words = [events.endpoint, str(events.replay_endpoint), str(int(reads)), str(int(replays))]
        command = [sys.executable, "-c", _PROGRAM, *words]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()

    return subscribe


_PROGRAM = """
import sys, time, zmq
live_at, replay_at, reads, replays = sys.argv[1:]
context = zmq.Context()
live, asker = context.socket(zmq.SUB), context.socket(zmq.DEALER)
live.setsockopt(zmq.SUBSCRIBE, b"")
live.set_hwm(100)
live.connect(live_at)
asker.connect(replay_at)
time.sleep(0.1)
print("ready", flush=True)
while True:
    if reads == "1":
        while live.poll(10):
            live.recv_multipart()
    elif replays == "0":
        time.sleep(1)
    if replays == "1":
        asker.send_multipart([b"", bytes(8)])
        while asker.recv_multipart()[-1]:
            pass
"""

VARIANTS: dict[str, Callable[[], Any]] = {
    "nobody": _nobody,
    "metrics": _metrics,
    "events": lambda: _events(_no_subscriber),
    "subscriber": lambda: _events(_subscriber(reads=True, replays=False)),
    "slow_subscriber": lambda: _events(_subscriber(reads=False, replays=False)),
    "replaying_subscriber": lambda: _events(_subscriber(reads=True, replays=True)),
}


# ---- one run ------------------------------------------------------------------------------------


def _decode(loaded: Loaded, events: BlockEvents | None, *, metrics: bool) -> Run:
    from runtime.account import Listener
    from runtime.engine import Engine
    from runtime.inbox import Order
    from runtime.sequence import Sampling
    from runtime.tally import Tally

    listeners: list[Listener] = [Tally(loaded.model.context_tokens)] if metrics else []
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        emit=lambda _: None,
        watchers=[events] if events else [],
        listeners=listeners + ([events] if events else []),
    )
    sampling = Sampling(temperature=0, max_tokens=_ANSWER, ignore_eos=True)
    prompts = [[300 + at % 700 + one for at in range(_PROMPT)] for one in range(_SEQUENCES)]
    engine.submit([Order(prompt, sampling) for prompt in prompts])
    engine.take_orders(wait=False)
    steps = []
    began, engine_began = time.process_time(), time.thread_time()
    while engine.load().running or engine.load().waiting:
        before = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - before) * 1e6)
    engine_s = time.thread_time() - engine_began
    return Run(median(steps), engine_s, time.process_time() - began)


def _counting_us(loaded: Loaded, count: int) -> float:
    """Of one step in which so many answers get a token that had their last one together."""
    from runtime.account import StepRecord
    from runtime.costs import StepSize
    from runtime.sequence import Sampling, Sequence, Times
    from runtime.tally import Tally

    tally = Tally(loaded.model.context_tokens)
    times = Times(arrived=0.0, admitted=0.1, first_token=0.2, last_token=0.3)
    sequences = [Sequence(key, [1], Sampling(), times=times) for key in range(count)]
    record = StepRecord(StepSize(count), 0.005, 0.004)
    taken = []
    for _ in range(30):
        began = time.thread_time()
        for _ in range(100):
            tally.sampled(sequences, 0.31)
            tally.stepped(record)
        taken.append((time.thread_time() - began) * 1e4)
    return round(median(taken), 2)


def _page(loaded: Loaded) -> dict[str, float]:
    from runtime.engine import Engine
    from runtime.fingerprint import LEAVES, combine
    from runtime.metrics_page import Page
    from runtime.tally import Tally

    tally = Tally(loaded.model.context_tokens)
    engine = Engine(loaded.model, loaded.tokenizer, emit=lambda _: None, listeners=[tally])
    identity = combine(dict.fromkeys(LEAVES))
    page = Page(tally, engine, model_name="pocket", rank=0, identity=identity)
    taken = []
    for _ in range(30):
        began = time.thread_time()
        text = page.text()
        taken.append((time.thread_time() - began) * 1e3)
    return {
        "page_ms": round(median(taken), 2),
        "page_kib": round(len(text) / 1024, 1),
        "page_lines": text.count(b"\n"),
    }


if __name__ == "__main__":
    sys.exit(main())
