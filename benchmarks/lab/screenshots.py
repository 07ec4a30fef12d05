"""`make screenshots`: pictures of the console under load, for docs/console.md.

Two workers with the pocket model, the gateway, three tenants' clients in talks of a few turns, and
a rollout that is under way: all of it runs, and all numbers are what it does. Only the verdicts are
written here, because a gate takes longer than a picture; they say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.lab.browser import Browser, BrowserFailed, Page, browser
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.stack import serve, stop
from policies.binding import sides
from policies.devices import devices
from policies.ledger import Ledger
from policies.load import load_hypothesis

PICTURES = ROOT / "docs" / "img"
POLICY = """\
version: 1
gateway:
  processes: 1
  admin: {key_env: HEADGATE_ADMIN_KEY}
  tenants:
    support: {key_env: KEY_SUPPORT, tiers: [interactive, standard], weight: 2.0}
    website: {key_env: KEY_WEBSITE, tokens_per_minute: 200000}
    nightly: {key_env: KEY_NIGHTLY, tiers: [batch], requests_per_minute: 300, tokens_per_day: 90000}
runtime: {model: pocket, threads: 1, compile: auto, workers: 2}
optimizations:
- {hypothesis: speculation-ngram.yaml}
- {hypothesis: kv-int8.yaml}
"""
LIVE, FAILED, ROLLED_OUT = "speculation-ngram", "kv-int8", "trim-batch"
# Tenant, tier, clients, their pauses.
DESKS = (
    ("support", "interactive", 2, 0.6), ("website", "standard", 2, 1.2),
    ("nightly", "batch", 1, 0.3),
)  # fmt: skip
ADMIN = "HEADGATE_ADMIN_KEY"
KEYS = {name: f"KEY_{name.upper()}" for name, *_ in DESKS}  # variables
WARM_S = 100.0  # of load before the first picture
CUT = "{maxHeight: '760px', overflow: 'hidden'}"  # of a list that goes on
SUITE = ROOT / "evals" / "data" / "pocket.jsonl"


def main() -> int:
    """Takes all pictures; 1 where there is no browser."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {
            name: f"hg-picture-{secrets.token_hex(12)}" for name in (ADMIN, *KEYS.values())
        }
        prepare(folder)
        with serve(folder / "base.yaml", os.environ[KEYS["website"]]) as stack:
            try:
                asyncio.run(take(folder, stack.url, stack.model))
            except BrowserFailed as error:
                print(error, file=sys.stderr)
                return 1
    return 0


def prepare(folder: Path) -> None:
    """A policy with shipped hypotheses, and verdicts on them."""
    (folder / "base.yaml").write_text(POLICY.split("optimizations")[0])
    for hypothesis in (LIVE, FAILED, ROLLED_OUT):
        text = (ROOT / "policies" / "hypotheses" / f"{hypothesis}.yaml").read_text()
        file = folder / f"{hypothesis}.yaml"
        file.write_text(text + "rollout: {shadow: 10, steps: [10%, 50%], min_step: 10m}\n")
    judge(folder, LIVE, "pass")
    judge(folder, FAILED, "fail")
    (folder / "base.yaml").write_text(POLICY)
    judge(folder, ROLLED_OUT, "pass")


def judge(folder: Path, name: str, decision: str) -> None:
    """A verdict for the picture alone, as of three days ago."""
    file, at = folder / f"{name}.yaml", time.time() - 3 * 86400
    hypothesis = load_hypothesis(file)
    found = zip(("baseline", "candidate", "spec"), sides(file, hypothesis, devices), strict=True)
    payload: dict[str, Any] = {
        "hypothesis": name, "decision": decision, "reason": "written for a picture",
        "made_at": at, "expires_at": at + 30 * 86400, "findings": [],
    }  # fmt: skip
    payload |= {side: {"root": one.root, "leaves": dict(one.leaves)} for side, one in found}
    Ledger.open(folder / ".headgate" / "ledger").record_verdict(payload)


async def take(folder: Path, url: str, model: str) -> None:
    """Raises BrowserFailed."""
    clients = [
        asyncio.create_task(talk(url, model, tenant, tier, number, pause_s))
        for tenant, tier, count, pause_s in DESKS
        for number in range(count)
    ]
    try:
        with rolling_out(folder / f"{ROLLED_OUT}.yaml", url):
            await asyncio.sleep(WARM_S)
            async with browser() as found:
                for width in (1440, 390):
                    for dark in (False, True):
                        await overview(found, url, width, dark=dark)
                await others(found, url)
    finally:
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def talk(url: str, model: str, tenant: str, tier: str, number: int, pause_s: float) -> None:
    """One client: talks of a few turns over the questions of a suite."""
    rng = random.Random(f"{tier} {number}")  # the same talks each time
    rows = [json.loads(line) for line in SUITE.read_text().splitlines()]
    async with aiohttp.ClientSession(url) as session:
        for at in range(10**6):
            messages: list[Any] = []
            for row in rng.sample(rows, rng.randint(1, 4)):
                asked = row["messages"] if not messages else row["messages"][-1:]
                messages += asked
                body = {
                    "model": model, "messages": messages, "stream": True, "max_tokens": 48,
                    "stream_options": {"include_usage": True}, "temperature": 0,
                }  # fmt: skip
                headers = {
                    "x-headgate-tier": tier, "x-session-id": f"{tier}-{number}-{at}",
                    "authorization": f"Bearer {os.environ[KEYS[tenant]]}",
                }  # fmt: skip
                path = "/v1/chat/completions"
                async with session.post(path, json=body, headers=headers) as answer:
                    said = (await answer.read()).decode()
                messages.append({"role": "assistant", "content": _text(said)})
                await asyncio.sleep(rng.expovariate(1 / pause_s))


def _text(stream: str) -> str:
    events = (line[6:] for line in stream.splitlines() if line.startswith("data: {"))
    choices = (choice for event in events for choice in json.loads(event).get("choices", ()))
    return "".join(choice["delta"].get("content") or "" for choice in choices) or "…"


@contextlib.contextmanager
def rolling_out(hypothesis: Path, url: str) -> Iterator[None]:
    """`headgate rollout` meanwhile."""
    with (hypothesis.parent / "rollout.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "headgate.py", "rollout", str(hypothesis), "--url", url],
            cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield
        finally:
            stop(process)
            print((hypothesis.parent / "rollout.log").read_text(), file=sys.stderr)


async def overview(found: Browser, url: str, width: int, *, dark: bool) -> None:
    page = await opened(found, url, width, 900, dark=dark)
    await page.until("document.querySelectorAll('.latest tbody tr').length >= 8")
    await asyncio.sleep(2.5)  # of its own samples
    await shot(page, f"console-{width}-{'dark' if dark else 'light'}")
    await page.value("location.hash = 'tenants'")
    await page.until("document.querySelectorAll('.tenants tbody tr').length >= 4")
    await shot(page, f"console-tenants-{width}-{'dark' if dark else 'light'}")


async def opened(found: Browser, url: str, width: int, height: int, *, dark: bool = False) -> Page:
    """A page that has been given the operator's key."""
    page = await found.page()
    await page.size(width, height, dark=dark)
    await page.open(f"{url}/console")
    await page.until("document.querySelector('#ask').open")
    await page.type(os.environ[ADMIN])
    await page.press("Enter")
    return page


async def others(found: Browser, url: str) -> None:
    """One request, and the playground."""
    page = await opened(found, url, 1440, 620)
    await page.until("document.querySelectorAll('.latest tbody tr').length >= 8")
    await page.value("location.hash = 'requests?order=slowest'")
    await page.until("document.querySelector('.buckets a[href]')")
    await page.value(f"Object.assign(document.querySelector('main').style, {CUT})")
    await shot(page, "console-requests")
    await page.value("document.querySelector('main').removeAttribute('style')")
    await page.value("[...document.querySelectorAll('.buckets a[href]')].at(-1).click()")
    await page.until("document.querySelector('.spans') && document.querySelector('.receipt')")
    await shot(page, "console-request")
    await page.value("location.hash = 'playground'")
    await page.until("document.querySelector('#ask-model option')")
    await page.value("document.querySelector('#ask-key').focus()")
    await page.type(os.environ[KEYS["website"]])
    await page.value("document.querySelector('#ask-key').dispatchEvent(new Event('change'))")
    rows = [json.loads(line) for line in SUITE.read_text().splitlines()]
    texts = [row for row in rows if row["form"] == "text"]
    longest = max(texts, key=lambda row: len(str(row["expected"])))
    for message in longest["messages"]:
        field = "#ask-system" if message["role"] == "system" else "#ask-prompt"
        said = json.dumps(message["content"])
        await page.value(f"document.querySelector('{field}').value = {said}")
    await page.value("document.querySelector('.asking form').requestSubmit()")
    await page.until("document.querySelector('.said').ariaBusy === 'false'")
    await shot(page, "console-playground")


async def shot(page: Page, name: str) -> None:
    file = PICTURES / f"{name}.png"
    await page.picture(file)
    smaller(file)
    print(f"{file.relative_to(ROOT)}  {file.stat().st_size // 1024} KiB", file=sys.stderr)


def smaller(file: Path) -> None:
    """With a palette, by pngquant where it is installed: a third of the bytes."""
    if program := shutil.which("pngquant"):
        subprocess.run(
            [program, "--force", "--skip-if-larger", "--output", str(file), "256", str(file)],
            check=False,
        )


if __name__ == "__main__":
    sys.exit(main())
