"""What parsing a request costs those that stream meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from gateway.call import COMPLETIONS_PATH, Call, parse_call, request_id
from runtime.wire import LARGE_BODY_BYTES, Problem, parse_completion


def gateway_parse(body: bytes) -> Call:
    return parse_call(COMPLETIONS_PATH, body, [], "r")


@pytest.mark.parametrize("parse", [gateway_parse, parse_completion])
@pytest.mark.parametrize("end", [b'"model": "m"}', b'"model": 7}', b""])
def test_a_large_body_is_parsed_without_a_collection(
    parse: Callable[[bytes], Any], end: bytes
) -> None:
    """Each once walked the tree that was being built; the collector is back on afterwards."""
    more = b"[]," * (LARGE_BODY_BYTES // 3)
    body = b'{"prompt": "x", "more": [' + more + b"[]], " + end
    seen: list[str] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        seen.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        if end == b'"model": "m"}':
            assert parse(body).model == "m"
            assert seen == []
        else:
            with pytest.raises(Problem):
                parse(body)
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()


@pytest.mark.parametrize("given", ["..", ".", "a/..", "../a", "team/./7"])
def test_an_id_that_is_no_part_of_a_path_is_replaced(given: str) -> None:
    """Nobody could open `/admin/traces/..`: clients take dots out of a path, encoded or not."""
    assert request_id([(b"x-request-id", given.encode())]).startswith("req_")


@pytest.mark.parametrize("given", ["...", "a..b", ".hidden", "team/7", "v1.2/x..", "/"])
def test_an_id_with_dots_or_slashes_beside_others_stays(given: str) -> None:
    assert request_id([(b"x-request-id", given.encode())]) == given


def test_ids_of_requests_differ_over_more_than_one_drawing() -> None:
    drawn = {request_id(()) for _ in range(1000)}
    assert len(drawn) == 1000
    assert {len(one) for one in drawn} == {len("req_") + 24}
