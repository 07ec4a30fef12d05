"""The gateway looks into its ledgers by itself, and tells others what they say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from policies.enabling import Gated
from policies.ledger import Ledger
from policies.schema import Deployment
from tests.gateway.test_variants import hi, put, steer, told
from tests.gateway.world import HELLO, Fake, Front, gateway, on_loop, upstream

B, C, S = "b" * 64, "c" * 64, "d" * 64
ROOTS = {"baseline": B, "candidate": C, "spec": S}


@asynccontextmanager
async def strict(folder: Path, fake: Fake) -> AsyncIterator[tuple[Front, Ledger]]:
    """A gateway by a policy file in the folder, as its program makes it."""
    async with gateway(fake) as front:
        policy = Deployment.model_validate({"version": 1, "upstreams": [{"url": fake.url}]})
        front.live.gated = Gated(folder / "policy.yaml", policy)
        yield front, Ledger.open(folder / ".headgate" / "ledger")


def record(ledger: Ledger, decision: str, at: float, **more: Any) -> None:
    sides = {name: {"root": root, "leaves": {}} for name, root in ROOTS.items()}
    payload = {"hypothesis": "h", "decision": decision, "made_at": at, **sides, **more}
    ledger.record_verdict(payload)


@on_loop
async def test_nothing_goes_to_a_candidate_without_a_verdict(tmp_path: Path) -> None:
    """Whoever asks for it, by hand or by a program: a shadow is free, a share needs a live pass for
    exactly these roots, at each renewal of the lease."""
    async with upstream(hi) as old, upstream(hi) as new, strict(tmp_path, old) as (front, ledger):
        wanted = {"id": "r1", "name": "h", "replicas": [{"url": new.url}], "roots": ROOTS}
        status, answer = await steer(front, "PUT", **wanted, share=0.5, lease_s=60)
        assert (status, answer["error"]["code"]) == (403, "no_live_pass")
        assert await told(front) is None
        await put(front, new, share=0.0, shadow=1.0, roots=ROOTS)
        status, _ = await steer(front, "PATCH", id="r1", share=0.5)
        assert status == 403
        record(ledger, "pass", 1.0)
        status, _ = await steer(front, "PATCH", id="r1", share=1.0, lease_s=60)
        assert status == 200
        assert (await front.post(HELLO)).headers["x-headgate-variant"] == "candidate"
        ledger.quarantine("h", C, "it looped")
        status, answer = await steer(front, "PATCH", id="r1", share=1.0)
        assert (status, answer["error"]["code"]) == (403, "no_live_pass")


@on_loop
async def test_what_argo_reads(tmp_path: Path) -> None:
    """One word for each state of the ledger, by the whole root or its short form."""
    async with upstream(hi) as old, strict(tmp_path, old) as (front, ledger):

        async def result(name: str = f"fp_{C[:12]}") -> str:
            answer = await front.client.get(f"/gate/{name}")
            assert answer.status_code == 200
            return str(answer.json()["result"])

        assert await result() == "inconclusive"
        record(ledger, "pass", 1.0)
        assert [await result(), await result(C), await result("c" * 8)] == ["pass"] * 3
        assert [await result("c" * 7), await result("fp_" + "e" * 12)] == ["inconclusive"] * 2
        record(ledger, "inconclusive", 2.0)
        assert await result() == "pass"  # it says nothing of the candidate
        ledger.quarantine("h", C, "it looped", at=3.0)
        assert await result() == "fail"
        record(ledger, "pass", 4.0, expires_at=5.0)
        assert await result() == "inconclusive"
        record(ledger, "fail", 6.0)
        assert await result() == "fail"


@on_loop
async def test_what_flagger_asks(tmp_path: Path) -> None:
    """200 confirms: a promotion with a pass, a rollback with a fail; else neither."""
    async with upstream(hi) as old, strict(tmp_path, old) as (front, ledger):
        body = {
            "name": "chat", "namespace": "prod", "phase": "Progressing",
            "metadata": {"fingerprint": f"fp_{C[:12]}"},
        }  # fmt: skip

        async def confirmed() -> tuple[int, int]:
            answers = [
                await front.client.post(f"/gate/{hook}", content=json.dumps(body))
                for hook in ("confirm-promotion", "rollback")
            ]
            return answers[0].status_code, answers[1].status_code

        assert await confirmed() == (403, 403)
        record(ledger, "pass", 1.0)
        assert await confirmed() == (200, 403)
        ledger.quarantine("h", C, "it looped", at=2.0)
        assert await confirmed() == (403, 200)
        body["metadata"] = {}
        assert await confirmed() == (400, 400)
