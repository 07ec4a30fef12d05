"""Whether our client measures what others measure, and others replay what our gateway records.

One server whose every moment is known; ours, guidellm and aiperf ask it the same, in turns. Then a
gateway records conversations, and guidellm and inference-perf play the file as it is.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from benchmarks.lab import peers_setup
from benchmarks.lab.edges import OURS, listening, ours, running
from benchmarks.lab.load_tools import REPLAYERS, TIMERS, Load, Times, installed
from benchmarks.lab.paced_server import FIRST_S, MODEL, STEP_S
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run
from evals.client import Client
from evals.filler import Filler
from evals.item import Item
from evals.replay import Replay
from evals.traces import read_trace
from telemetry import Observation

_LOAD = Load(requests=48, at_once=4, prompt_tokens=64, answer_tokens=32)
_ROUNDS = 3
_CONVERSATIONS, _TURNS = 6, 3

ABOUT = About(
    name="clients_agree",
    peers=("guidellm", "aiperf", "inference-perf"),
    measures=(
        f"A server gives the first token {1000 * FIRST_S:g} ms after a request and one each "
        f"{1000 * STEP_S:g} ms after that. Ours, guidellm and aiperf send it {_LOAD.requests} "
        f"requests for {_LOAD.answer_tokens} tokens, {_LOAD.at_once} at once, in turns and rounds: "
        "medians over requests, then over rounds, in ms; `tpot` is their inter token latency, by "
        "the server's count of tokens. `..._off` is the largest distance of ours from one of them "
        f"within a round, as a share, the median over rounds. Then {_CONVERSATIONS} conversations "
        f"of {_TURNS} turns go through a gateway that records, and the file, untouched, through "
        "each tool that replays: the share of the recorded requests that came to the server with "
        "the very messages and limits."
    ),
    goals=(
        Goal("ttft_off", 0.05, "at most", "first tokens agree within 5 %"),
        Goal("tpot_off", 0.05, "at most", "further tokens agree within 5 %"),
        Goal("replayed_share", 1.0, "at least", "every recorded request comes unchanged"),
    ),
    more="`--setup [PEER ...]` makes environments and ends; line by line:\n"
    + peers_setup.told(peers_setup.CLIENTS),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--setup"]:
        return peers_setup.main(arguments[1:], peers_setup.CLIENTS)
    return run(ABOUT, measure, arguments)


def measure(settings: Settings) -> Measured:
    timers = [name for name in TIMERS if installed(name)]
    replayers = [name for name in REPLAYERS if installed(name)]
    if not timers and not replayers:
        raise MeasurementFailed("none of the peers is installed: --setup makes environments")
    rounds: dict[str, list[Times]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, listening("paced_server", name) as port:
        folder, url = Path(name), f"http://127.0.0.1:{port}"
        for number in range(1 if settings.quick else _ROUNDS):
            rounds[OURS].append(asyncio.run(_ask(url)))
            for tool in timers:
                rounds[tool].append(TIMERS[tool](url, _LOAD, folder))
                settings.progress(f"round {number + 1}: {tool}")
        shares = _replays(replayers, port, folder, settings)
    results: dict[str, Any] = {tool: _medians(times) for tool, times in rounds.items()}
    results["replayed"] = shares
    values, missing = {}, {}
    if timers:
        values = {f"{field}_off": _off(rounds, f"{field}_ms") for field in ("ttft", "tpot")}
    else:
        missing = dict.fromkeys(("ttft_off", "tpot_off"), "guidellm and aiperf are not installed")
    if shares:
        values["replayed_share"] = min(shares.values())
    else:
        missing["replayed_share"] = "guidellm and inference-perf are not installed"
    return Measured(results, values, {"rounds": len(rounds[OURS])}, missing)


# ---- times --------------------------------------------------------------------------------------


async def _ask(url: str, load: Load = _LOAD) -> Times:
    """Our own client under the same load."""
    words = " ".join(["word"] * load.prompt_tokens)
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": words}],
        "max_tokens": load.answer_tokens,
    }  # fmt: skip
    items = [Item(f"{n}", f"{n}", 0, body) for n in range(load.requests)]
    async with Client(url) as client:

        async def ask(item: Item) -> Observation:
            return await client.ask(item, OURS, "paced", now=monotonic)

        play = Replay(ask, speed=None, at_once=load.at_once, clock=monotonic)
        seen = [one async for one in play.observations(items)]
    if failed := [one for one in seen if not one.ok]:
        raise MeasurementFailed(f"a request of ours failed: {failed[0].problem}")
    return Times(
        1000 * median(one.ttft_s for one in seen if one.ttft_s is not None),
        1000 * median(one.tpot_s for one in seen if one.tpot_s is not None),
        len(seen),
    )


def _medians(times: Sequence[Times]) -> dict[str, float]:
    return {
        name: round(median(getattr(one, name) for one in times), 2)
        for name in ("ttft_ms", "tpot_ms", "requests")
    }


def _off(rounds: Mapping[str, Sequence[Times]], field: str) -> float:
    """The largest distance from one of the others within a round; the median of the rounds."""
    others = [tool for tool in rounds if tool != OURS]
    worst: list[float] = []
    for number, own in enumerate(rounds[OURS]):
        ratios = [getattr(own, field) / getattr(rounds[tool][number], field) for tool in others]
        worst.append(max(abs(ratio - 1) for ratio in ratios))
    return round(median(worst), 4)


# ---- replays ------------------------------------------------------------------------------------


def _replays(tools: Sequence[str], port: int, folder: Path, settings: Settings) -> dict[str, float]:
    recorded = folder / "recorded"
    policy = f"gateway:\n  record: {{consent: given, path: {recorded}}}\n"
    with running(OURS, port, command=ours(policy)) as edge:
        asyncio.run(_converse(f"http://127.0.0.1:{edge.port}"))
    (file,) = recorded.glob("*.jsonl")
    wanted = [_told(dict(item.body)) for item in read_trace(recorded).items(Filler())]
    if len(wanted) != _CONVERSATIONS * _TURNS:
        raise MeasurementFailed(f"{len(wanted)} requests were recorded, not all")
    shares = {}
    for tool in tools:
        seen = _bodies(folder)
        REPLAYERS[tool](f"http://127.0.0.1:{port}", file, len(wanted), folder)
        came = [_told(json.loads(line)) for line in _bodies(folder)[len(seen) :]]
        shares[tool] = round(sum(one in came for one in wanted) / len(wanted), 3)
        settings.progress(f"replayed by {tool}: {len(came)} requests")
    return shares


async def _converse(url: str) -> None:
    async with Client(url) as client:
        for number in range(_CONVERSATIONS):
            messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer briefly."}]
            for turn in range(_TURNS):
                question = f"Conversation {number}, question {turn}: which order is late?"
                messages.append({"role": "user", "content": question})
                body = {"model": MODEL, "messages": messages, "max_tokens": 6 + turn}
                item = Item(f"{number}-{turn}", f"{number}", turn, body)
                seen = await client.ask(item, OURS, "paced", now=monotonic)
                if not seen.ok:
                    raise MeasurementFailed(f"a request of ours failed: {seen.problem}")
                messages.append({"role": "assistant", "content": seen.text})


def _bodies(folder: Path) -> list[str]:
    return (folder / "bodies.jsonl").read_text("utf-8").splitlines()


def _told(body: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a request has to come unchanged: who said what, and how long the answer may be."""
    said = tuple((one["role"], _text(one.get("content"))) for one in body["messages"])
    return said, body.get("max_completion_tokens") or body.get("max_tokens")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


if __name__ == "__main__":
    sys.exit(main())
