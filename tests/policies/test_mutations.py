"""Whatever becomes of a policy file: it loads, or its problems point into it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given, settings, strategies as st

from policies.load import PolicyError, load

VALID = """\
# a comment
version: 1
gateway: {host: "127.0.0.1", port: 8080}
runtime:
  model: &name pocket
  served_name: *name
  kv_tokens: 0x8000
upstreams:
  - url: 'http://127.0.0.1:8000/v1'
    api_key_env: KEY
"""
SPICE = [
    "\t", "\n", "\r", "\r\n", " ", "  ", ": ", "- ", "# ", "? ", "[", "]", "{", "}", ",", "&a ",
    "*a", "*name", "!!int ", "!x ", "! ", "|", ">", "|2-\n", "'", '"', '"\\x', '"\\UFFFFFFFF"',
    '"\\uD800"', "%YAML 9.9\n", "%YAML 99999999999999999999.1\n", "%TAG ! x\n", "---\n", "...\n",
    "<<: ", "~", "null", ".nan", "-.inf", "1e400", "0o9", "0x", "9" * 80, "\x00", "\x85", "\u2028",
    "\ufeff", "\U0001f600", "\x7f", "@", "`", "version", "port", "2001-01-01",
]  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """The valid file after a few cuts, repeats and insertions."""
    text = VALID
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        what = draw(st.sampled_from(("insert", "cut", "repeat")))
        piece = draw(st.sampled_from(SPICE) | st.text(max_size=6)) if what == "insert" else ""
        kept = text[start:end] * 2 if what == "repeat" else ""
        text = text[:start] + piece + kept + text[start if what == "insert" else end :]
    body = text.encode("utf-8", "surrogatepass")
    at = draw(st.integers(0, len(body)))
    return body[:at] + draw(st.sampled_from((b"", b"", b"", b"\xff", b"\x80"))) + body[at:]


def check(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "policy.yaml"
        file.write_bytes(body)
        try:
            load(file)
        except PolicyError as error:
            assert error.problems
            lines = max(1, body.count(b"\n") + body.count(b"\r") + 1)
            text = body.decode("utf-8", "replace").splitlines() or [""]
            lines = max(lines, len(text))
            for problem in error.problems:
                assert problem.message
                if problem.place:
                    assert 1 <= problem.place.line <= lines
                    assert problem.place.column >= 1
            shown = str(error)
            assert len(shown.split("\n")) == len(error.problems)
            shown.encode()


@settings(max_examples=300, deadline=None)
@given(mutations())
@example(b'a: "\\UFFFFFFFF"')
@example(b"%YAML 99999999999999999999.1\n---\na: 1")
@example(b"a: |9\n")
@example(b"a: *")
@example(b"? ")
@example(b"&a &b c")
def test_a_mutated_file_loads_or_is_explained(body: bytes) -> None:
    check(body)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_load_or_are_explained(body: bytes) -> None:
    check(body)
