"""The gateway does what its OpenAPI document says, for whatever a generator of requests finds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from gateway.openapi import document
from policies.schema import Gateway
from tests.gateway.world import gateway, on_loop, upstream

SECONDS = 50


def test_the_document_names_the_policys_tiers_and_whether_keys_are_needed() -> None:
    tiers = Gateway().tiers
    told = document(tiers, keys=True)
    parameters = told["paths"]["/v1/chat/completions"]["post"]["parameters"]
    assert parameters[0]["schema"]["enum"] == ["interactive", "standard", "relaxed", "batch"]
    assert told["security"] == [{"key": []}]
    assert told["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document(tiers, keys=False)


@on_loop
async def test_generated_requests_get_what_the_document_says(tmp_path: Path) -> None:
    """schemathesis, bounded: valid requests are served, invalid ones refused, both in the shapes
    described; no answer is a 500."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", "--max-examples", "12", "--seed", "7",
        "--phases", "examples,fuzzing", "--no-color",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection,positive_data_acceptance",
    ]  # fmt: skip
    async with upstream(models=("m",)) as fake, gateway(fake, wait=True) as edge:
        process = await asyncio.create_subprocess_exec(
            *command, f"{edge.url}/openapi.json", cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(SECONDS):
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()[-6000:]
        paths = {request.path for request in fake.requests}
        assert paths == {"/v1/chat/completions", "/v1/completions"}  # some were right all through
