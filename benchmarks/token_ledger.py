"""`python -m benchmarks.token_ledger`: the ledger's invariants over a whole recording, with faults.

Recorded requests go through a gateway, whose replicas break some of their answers, to a worker;
some clients leave. Whatever happens, the counts of gateway and worker have to agree; where a
replica is made to miscount, each miscount has to be found. The worker guesses ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.lab import faulty, report
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.edges import OURS, Command, Edge, running
from benchmarks.lab.faulty import Faulty
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings
from benchmarks.lab.stack import ask_health, serve
from runtime.wire import MARKS_HEADER

RECORDING = ROOT.parent / "shared" / "data" / "replay" / "requests.jsonl.gz"
AT_ONCE = 8
ANSWER_TOKENS = 24
BREAKS, LEAVES, LIES = 0.25, 0.1, 0.25
LIED_TO = 200  # requests of the run in which replicas miscount
QUICK = 100
CHAT = "/v1/chat/completions"
# Everybody's answers are guessed at, by looking up; by a draft model those of one tier.
WORKER = """version: 1
runtime:
  model: pocket
  kv_tokens: 16384
  threads: 1
  speculation:
    proposer: ngram
    max_tokens: 4
    draft: pocket
    tiers: {batch: {proposer: draft, max_tokens: 3}}
"""
MARKED, DRAFTED = 0.5, 0.25  # shares of requests whose guesses are marked, and that a draft guesses
GATEWAY = """version: 1
gateway:
  resume: auto
  idle_timeout_s: {idle_s}
  retries: {{max_attempts: 6, budget_share: 1.0, budget_min_per_s: 50}}
  breaker: {{failures: 1000}}
upstreams:
"""
UPSTREAM = "  - {{url: {url}, kind: headgate, tokenizer: {tokenizer}}}\n"
VIOLATIONS = "headgate_token_ledger_violations_total"
CHECKED = "headgate_token_ledger_requests_total"
TOKENS = "headgate_token_ledger_tokens_total"

ABOUT = About(
    name="token_ledger",
    measures=(
        "Whether tokens add up: 2,000 recorded requests (chat, documents, agents, retrieval, "
        f"batch; answers of at most {ANSWER_TOKENS} tokens, {AT_ONCE} at once) through a gateway "
        "with `resume: auto` and two replicas that break a quarter of their answers (refused, "
        "reset, cut, garbled, stalled) before one worker with the pocket model, which guesses "
        "ahead by look-ups and, for a quarter, by its draft; half of the streams mark guesses; a "
        f"tenth of the clients leave. Then {LIED_TO} requests whose replicas tell a wrong usage in "
        f"a quarter of their answers, in one of {len(faulty.MISCOUNTS)} ways: each has to be found "
        "under its invariant."
    ),
    goals=(
        Goal("violations", 0, "at most", "no counts of gateway and worker disagree, with faults"),
        Goal("accepted_share", 0.02, "at least", "of the answers' tokens had been guessed"),
        Goal("checked_share", 0.7, "at least", "of the answers that came whole were checked"),
        Goal("lies_found", 1.0, "at least", "share of planted miscounts that are found"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    if not RECORDING.exists():
        raise MeasurementFailed(f"{RECORDING} is missing: the recorded requests lie there")
    bodies = list(recorded())
    random.Random(7).shuffle(bodies)
    with _worker() as (url, tokenizer):
        return asyncio.run(_measure(bodies[:QUICK] if settings.quick else bodies, url, tokenizer))


def recorded() -> Iterator[dict[str, Any]]:
    """The bodies of the recording, with shorter answers."""
    with gzip.open(RECORDING, "rt", encoding="utf-8") as lines:
        for line in lines:
            body = json.loads(line)["body"]
            most = min(body.get("max_tokens") or ANSWER_TOKENS, ANSWER_TOKENS)
            yield body | {"model": "pocket", "max_tokens": most}


@contextlib.contextmanager
def _worker() -> Iterator[tuple[str, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.yaml"
        policy.write_text(WORKER, encoding="utf-8")
        with serve(policy) as stack:
            yield stack.worker_url, ROOT / "pocket" / "target"


def _command(tokenizer: Path, idle_s: float) -> Command:
    def command(upstreams: Sequence[str], port: int, folder: Path) -> Sequence[str]:
        policy = folder / "policy.yaml"
        ends = [UPSTREAM.format(url=one, tokenizer=tokenizer) for one in upstreams]
        policy.write_text(GATEWAY.format(idle_s=idle_s) + "".join(ends), encoding="utf-8")
        return (sys.executable, "-m", "gateway", str(policy), "--port", str(port))

    return command


@contextlib.asynccontextmanager
async def _before(
    worker: str, tokenizer: Path, *, breaks: float = 0.0, lies: float = 0.0
) -> AsyncIterator[tuple[Edge, tuple[Faulty, Faulty]]]:
    """A gateway before two replicas that break, or miscount."""
    one, two = (Faulty(worker, random.Random(seed), breaks, lies) for seed in (1, 2))
    async with one, two:
        # Whoever is slow is left where some stall, and never where each lie has to arrive.
        command = _command(tokenizer, 1.0 if breaks else 60.0)
        start = running(OURS, one.port, two.port, command=command)
        edge = await asyncio.to_thread(start.__enter__)
        try:
            await asyncio.to_thread(_await_tokenizer, edge.port)
            yield edge, (one, two)
        finally:
            await asyncio.to_thread(start.__exit__, None, None, None)


def _await_tokenizer(port: int) -> None:
    """Until it is loaded, which happens beside the first requests, prompts are not counted."""
    while not ask_health(port)[1]["prompts"]["tokenizers"]:
        time.sleep(0.1)


async def _measure(bodies: Sequence[dict[str, Any]], worker: str, tokenizer: Path) -> Measured:
    async with _before(worker, tokenizer, breaks=BREAKS) as (edge, replicas):
        ends = await play(edge.port, bodies, LEAVES)
        told = await asyncio.to_thread(scrape, f"http://127.0.0.1:{edge.port}")
        made = sum((one.made for one in replicas), Counter())
    beneath = await asyncio.to_thread(scrape, worker)
    async with _before(worker, tokenizer, lies=LIES) as (edge, replicas):
        await play(edge.port, bodies[:LIED_TO], 0.0)
        lied = await asyncio.to_thread(scrape, f"http://127.0.0.1:{edge.port}")
        planted = sum((one.made for one in replicas), Counter())
    found = {name: round(lied[f"{VIOLATIONS} {name}"]) for name in faulty.MISCOUNTS}
    hit = sum(min(found[name], planted[name]) for name in faulty.MISCOUNTS)
    violations = _of(told, VIOLATIONS) | {
        f"worker {name}": count for name, count in _of(beneath, VIOLATIONS).items()
    }
    results = {
        "clients": dict(ends),
        "faults": dict(made),
        "checked": {"gateway": told[CHECKED], "worker": beneath[CHECKED]},
        "gateway_tokens": _of(told, TOKENS),
        "worker_tokens": _of(beneath, TOKENS),
        "violations": violations,
        "planted": dict(planted),
        "found": found,
    }
    values = {
        "violations": sum(violations.values()),
        "accepted_share": told[f"{TOKENS} accepted"] / max(1, told[f"{TOKENS} emitted"]),
        "checked_share": told[CHECKED] / max(1, ends["whole"]),
        "lies_found": hit / max(1, sum(planted.values())),
    }
    return Measured(results, values, {"model": "pocket", "requests": len(bodies)})


async def play(port: int, bodies: Sequence[dict[str, Any]], leaves: float) -> Counter[str]:
    """All requests, a few at once; how they ended for their clients."""
    rng, ends = random.Random(3), Counter[str]()
    work = iter(
        [(body, _headers(rng), rng.random() < leaves, rng.randrange(1, 2000)) for body in bodies]
    )
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as session:

        async def client() -> None:
            for body, headers, leave, after in work:
                ends[await _ask(session, body, headers, after if leave else None)] += 1

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return ends


def _headers(rng: random.Random) -> Mapping[str, str]:
    marked = {MARKS_HEADER: "1"} if rng.random() < MARKED else {}
    return marked | ({"x-headgate-tier": "batch"} if rng.random() < DRAFTED else {})


async def _ask(
    session: aiohttp.ClientSession,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    leave_after: int | None,
) -> str:
    """`whole`, `left` after so many bytes, `broken` inside a stream, or a refusal's status."""
    asked = dict(body)
    if asked.get("stream"):
        asked["stream_options"] = {"include_usage": True}
    got = b""
    try:
        async with session.post(CHAT, data=orjson.dumps(asked), headers=headers) as answer:
            async for data in answer.content.iter_any():
                got += data
                if leave_after is not None and len(got) >= leave_after:
                    answer.close()
                    return "left"
            if answer.status != 200:
                return str(answer.status)
    except aiohttp.ClientError:
        return "broken"
    return "broken" if b'data: {"error"' in got else "whole"


def scrape(url: str) -> dict[str, float]:
    """Value by name and the label that is our own, if there is one."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        text = page.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("headgate_token_ledger_"):
                own = sample.labels.get("invariant") or sample.labels.get("stage")
                found[f"{sample.name} {own}" if own else sample.name] = sample.value
    return found


def _of(told: Mapping[str, float], name: str) -> dict[str, float]:
    return {key.split(" ")[1]: value for key, value in told.items() if key.startswith(f"{name} ")}


if __name__ == "__main__":
    sys.exit(main())
