"""The ledger: what was acknowledged is read back, whoever dies and however full the disk is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from policies.ledger import LINES, VERDICTS, Decision, Ledger, LedgerError
from policies.side import Side, canonical, changed

ROOT = Path(__file__).parents[2]
DAY = 86400.0


def payload(decision: str = "pass", at: float = 1000.0, **more: Any) -> dict[str, Any]:
    """What `Verdict.payload()` gives, as far as the ledger looks."""
    sides = {name: {"root": name[0] * 64, "leaves": {}} for name in ("baseline", "candidate")}
    return {
        "hypothesis": "w8a8",
        **sides,
        "spec": {"root": "5" * 64, "leaves": {}},
        "decision": decision,
        "reason": "",
        "made_at": at,
        "expires_at": at + 30 * DAY,
    } | more


B, C, S = "b" * 64, "c" * 64, "5" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / ".headgate" / "ledger")


# ---- what is live -------------------------------------------------------------------------------


def test_nothing_is_live_where_there_is_no_ledger(ledger: Ledger) -> None:
    assert ledger.read().decisions == ()
    assert ledger.read().live(B, C, S, 0.0) is None
    assert not ledger.folder.exists()


def test_a_pass_is_live_for_its_three_roots_until_it_expires(ledger: Ledger) -> None:
    """No other pair, no other specification, and not from the moment of its end on."""
    made = ledger.record_verdict(payload())
    assert ledger.read().live(B, C, S, 1000.0) == made
    assert ledger.verdict(made.evidence) == payload()
    for roots in ((C, B, S), (B, B, S), (B, C, B)):
        assert ledger.read().live(*roots, 1000.0) is None
    assert ledger.read().live(B, C, S, 1000.0 + 30 * DAY - 1) == made
    assert ledger.read().live(B, C, S, 1000.0 + 30 * DAY) is None


def test_a_copy_without_folders_is_read_as_it_was(ledger: Ledger, tmp_path: Path) -> None:
    """As a ConfigMap has it: the verdicts' files beside the lines. A file that is another one is
    refused there, too."""
    made = ledger.record_verdict(payload())
    copy = Ledger.open(tmp_path / "copy")
    copy.folder.mkdir()
    copy.lines.write_bytes(ledger.lines.read_bytes())
    flat = copy.folder / f"{made.evidence}.json"
    flat.write_bytes((ledger.folder / VERDICTS / flat.name).read_bytes())
    assert copy.read().decisions == (made,)
    assert copy.verdict(made.evidence) == payload()
    flat.write_bytes(flat.read_bytes().replace(b"pass", b"fail"))
    with pytest.raises(LedgerError, match="another hash"):
        copy.verdict(made.evidence)


@pytest.mark.parametrize(
    ("then", "is_live"),
    [("fail", False), ("no_benefit", False), ("inconclusive", True), ("invalid", True)],
)
def test_a_later_verdict_decides_if_it_says_anything(
    ledger: Ledger, then: str, is_live: bool
) -> None:
    """A run that shows nothing takes nothing back."""
    ledger.record_verdict(payload())
    ledger.record_verdict(payload(then, at=2000.0))
    assert (ledger.read().live(B, C, S, 2000.0) is not None) is is_live


@pytest.mark.parametrize("decision", ["fail", "inconclusive", "invalid", "no_benefit"])
def test_only_a_pass_enables(ledger: Ledger, decision: str) -> None:
    ledger.record_verdict(payload(decision))
    assert ledger.read().live(B, C, S, 1000.0) is None


def test_a_quarantine_holds_until_new_evidence(ledger: Ledger) -> None:
    """The old pass recorded once more is no new evidence; one that was made later is."""
    ledger.record_verdict(payload())
    ledger.quarantine("w8a8", C, "rolled back: 5xx", at=1500.0)
    assert ledger.read().live(B, C, S, 1600.0) is None
    ledger.record_verdict(payload())
    assert ledger.read().live(B, C, S, 1600.0) is None
    later = ledger.record_verdict(payload(at=1700.0))
    assert ledger.read().live(B, C, S, 1800.0) == later


def test_a_quarantine_finds_its_verdict_by_the_evidence_too(ledger: Ledger) -> None:
    """What ran was the verdict's candidate, though a leaf that does not count had changed since."""
    made = ledger.record_verdict(payload())
    ledger.quarantine("w8a8", "9" * 64, "looped", evidence=made.evidence, at=1500.0)
    assert ledger.read().live(B, C, S, 1600.0) is None


def test_a_quarantine_of_another_candidate_is_not_ours(ledger: Ledger) -> None:
    made = ledger.record_verdict(payload())
    ledger.quarantine("other", "9" * 64, "looped", at=1500.0)
    assert ledger.read().live(B, C, S, 1600.0) == made


# ---- damage -------------------------------------------------------------------------------------


def test_evidence_that_was_changed_or_is_gone_is_told(ledger: Ledger) -> None:
    made = ledger.record_verdict(payload())
    file = ledger.folder / VERDICTS / f"{made.evidence}.json"
    file.write_text(file.read_text().replace("w8a8", "w8a9"))
    with pytest.raises(LedgerError, match="another hash"):
        ledger.verdict(made.evidence)
    file.unlink()
    with pytest.raises(LedgerError, match="cannot be read: No such file"):
        ledger.verdict(made.evidence)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"\xff", b'{"kind": "verdict"}', b'{"at": 1}', b"null", b"[" * 5000,
     b'{"kind":"verdict","hypothesis":1,"baseline":"","candidate":"","spec":"","at":0}',
     b'{"kind":"verdict","hypothesis":"x","baseline":"","candidate":"","spec":"","at":"0"}'],
)  # fmt: skip
def test_a_line_that_is_no_decision_is_told_and_the_others_stay(
    ledger: Ledger, line: bytes
) -> None:
    first = ledger.record_verdict(payload())
    with ledger.lines.open("ab") as file:
        file.write(line + b"\n")
    last = ledger.record_verdict(payload(at=2000.0))
    found = ledger.read()
    assert found.decisions == (first, last)
    assert found.damaged == (2,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.data())
def test_cut_anywhere_it_is_what_was_whole_and_goes_on(before: int, data: st.DataObject) -> None:
    """The writer dies at any byte of its line: earlier decisions stand, and later ones follow."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.open(folder)
        said = [a_decision(at) for at in range(before + 1)]
        for one in said:
            ledger.record(one)
        body = ledger.lines.read_bytes()
        begins = body.rindex(b"\n", 0, len(body) - 1) + 1 if before else 0
        cut = data.draw(st.integers(begins, len(body) - 1))
        ledger.lines.write_bytes(body[:cut])
        assert ledger.read().decisions == tuple(said[:-1])
        ledger.record(said[-1])
        found = ledger.read().decisions
        # A line that lacks its end alone is whole once another follows.
        assert found in (tuple(said), (*said, said[-1]))


def a_decision(at: float, name: str = "x") -> Decision:
    return Decision("rollout", name, "", "c", "", float(at), "shadow", detail={"share": 0.01})


def test_a_file_that_cannot_be_read_is_an_error_not_an_empty_ledger(tmp_path: Path) -> None:
    (tmp_path / LINES).mkdir()
    with pytest.raises(LedgerError, match=r"decisions.jsonl cannot be read"):
        Ledger.open(tmp_path).read()


WRITER = """
import sys
from policies.ledger import Decision, Ledger
ledger = Ledger.open(sys.argv[1])
print("ready", flush=True)
for at in range(int(sys.argv[3])):
    ledger.record(Decision("rollout", sys.argv[2], "", "c" * int(sys.argv[4]), "", float(at)))
    print(at, flush=True)
"""


def writer(folder: Path, name: str, count: int, width: int = 64) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(count), str(width)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_writers_lose_nothing_and_mix_no_lines(tmp_path: Path) -> None:
    """Two processes at once, with lines longer than one write of a pipe."""
    both = [writer(tmp_path, name, 40, 9000) for name in ("one", "two")]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = Ledger.open(tmp_path).read()
    assert found.damaged == ()
    for name in ("one", "two"):
        assert [one.at for one in found.decisions if one.hypothesis == name] == list(range(40))


def test_a_killed_writer_loses_nothing_that_it_was_told_is_written(tmp_path: Path) -> None:
    process = writer(tmp_path, "x", 10**6)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    acknowledged = [int(line) for line in (*told[1:], *rest.splitlines()) if line.strip()]
    ledger = Ledger.open(tmp_path)
    assert ledger.read().damaged == ()
    moments = [int(one.at) for one in ledger.read().decisions]
    assert moments[: len(acknowledged)] == acknowledged
    ledger.record(a_decision(-1.0))
    assert ledger.read().decisions[-1] == a_decision(-1.0)


FULL = """
import resource, sys
from policies.ledger import Decision, Ledger, LedgerError
ledger = Ledger.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    if sys.argv[3] == "line":
        ledger.record(Decision("rollout", "late", "", "c" * 500, "", 9.0))
    else:
        ledger.record_verdict({"hypothesis": "late", "baseline": {"root": "b"}, "spec":
            {"root": "s"}, "candidate": {"root": "c"}, "made_at": 9.0, "decision": "pass",
            "findings": "x" * 5000})
except LedgerError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("what", ["line", "verdict"])
def test_a_full_disk_is_told_and_leaves_the_ledger_as_it_was(ledger: Ledger, what: str) -> None:
    """The file may grow by 100 bytes more; the half that went in is taken out again."""
    ledger.record_verdict(payload())
    before = ledger.lines.read_bytes()
    files = sorted((ledger.folder / VERDICTS).iterdir())
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(ledger.folder), str(len(before) + 100), what],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert ledger.lines.read_bytes() == before
    assert sorted((ledger.folder / VERDICTS).iterdir()) == files


def test_a_ledger_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger.open(tmp_path / "ledger").record(a_decision(0))
    with pytest.raises(LedgerError, match="no verdict can be kept"):
        Ledger.open(tmp_path / "ledger").record_verdict(payload())


def test_the_lines_can_be_read_by_anyone(ledger: Ledger) -> None:
    """One JSON object a line, in one spelling; the verdict's file is named by its content."""
    made = ledger.record_verdict(payload())
    (line,) = ledger.lines.read_bytes().splitlines()
    assert json.loads(line)["decision"] == "pass"
    assert line == canonical(json.loads(line))
    (file,) = (ledger.folder / VERDICTS).iterdir()
    assert file.name == f"{made.evidence}.json"


# ---- sides --------------------------------------------------------------------------------------


def test_every_leaf_counts_and_none_passes_for_another() -> None:
    facts: dict[str, Any] = {"weights": {"a": 1}, "trim": {"a": 1}, "slo": {"a": 1}}
    whole = Side.of(facts)
    assert len(set(whole.leaves.values())) == 3
    others = [Side.of(facts | {name: {"a": 2}}) for name in facts]
    others += [Side.of(facts | {name: None}) for name in facts]
    assert len({whole.root, *(one.root for one in others)}) == 7
    assert [changed(whole, one) for one in others[:3]] == [(name,) for name in facts]
    assert changed(whole, others[5]) == ("slo",)
    assert Side.over(dict(reversed(whole.leaves.items()))) == whole
