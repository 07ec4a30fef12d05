"""What parsing a request costs those that stream meanwhile."""

from __future__ import annotations

import gc

import pytest

from gateway.call import COMPLETIONS_PATH, LARGE_BODY_BYTES, parse_call
from runtime.wire import Problem


@pytest.mark.parametrize("end", [b'"model": "m"}', b'"model": 7}', b""])
def test_a_large_body_is_parsed_without_a_collection(end: bytes) -> None:
    """Each once walked the tree that was being built; the collector is back on afterwards."""
    body = b'{"prompt": [' + b"[]," * (LARGE_BODY_BYTES // 3) + b"[]], " + end
    seen: list[str] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        seen.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        if end == b'"model": "m"}':
            assert parse_call(COMPLETIONS_PATH, body, [], "r").model == "m"
            assert seen == []
        else:
            with pytest.raises(Problem):
                parse_call(COMPLETIONS_PATH, body, [], "r")
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
