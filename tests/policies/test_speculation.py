"""How speculation is asked for, and what each mistake is told before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command.policy import check_files
from command.serve import plan
from policies.load import PolicyError, guess_problems, load, resolve_draft, tier_problems
from policies.model_folder import pocket_folder
from policies.schema import Guesses, Runtime, Speculation


def write(folder: Path, *lines: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text("version: 1\nruntime:\n  model: pocket\n" + "\n".join(lines) + "\n")
    return file


def loaded(folder: Path, *lines: str) -> Runtime:
    runtime = load(write(folder, *lines)).runtime
    assert runtime is not None
    return runtime


def told(folder: Path, *lines: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load(write(folder, *lines))
    return str(caught.value).removeprefix(f"{folder / 'policy.yaml'}:")


def test_it_is_off_unless_asked_for_and_a_word_is_enough(tmp_path: Path) -> None:
    """`off`, `auto` and a mapping; tiers and models in the same forms."""
    assert loaded(tmp_path).speculation.asked == {"off"}
    assert loaded(tmp_path, "  speculation: off").speculation.proposer == "off"
    assert loaded(tmp_path, "  speculation: auto").speculation == Speculation(proposer="auto")
    whole = loaded(
        tmp_path,
        "  speculation:",
        "    proposer: ngram",
        "    max_tokens: 4",
        "    tiers: {batch: off, chat: {proposer: auto, max_tokens: 9}}",
        "    models: {mine: tree}",
    ).speculation
    assert whole.tiers == {"batch": Guesses(proposer="off"), "chat": Guesses(max_tokens=9)}
    assert whole.models == {"mine": Guesses(proposer="tree")}
    assert whole.asked == {"ngram", "off", "auto", "tree"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{max_tokens: 0}", "4:29  runtime.speculation.max_tokens  expected at least 1"),
        ("{max_tokens: 1000}", "4:29  runtime.speculation.max_tokens  expected at most 15"),
        ("{proposer: synthetic}", "it is for benchmarks, which build their engine themselves"),
        ("{proposer: ngrm}", "did you mean 'ngram'?"),
        ("{proposer: draft}", "proposer: draft needs `draft`, the model that guesses"),
        ("{tiers: {a: {proposer: draft}}}", "proposer: draft needs `draft`"),
        ("{proposer: self}", "proposer: self needs `self_draft`: w8a8 or layers"),
        ("{draft: pocket, self_draft: w8a8}", "give `draft` or `self_draft`, not both"),
        ("{tiers: {a: {max_tokens: 99}}}", "runtime.speculation.tiers.a.max_tokens  expected at"),
        ("{tiers: {a: {prposer: auto}}}", "did you mean 'proposer'?"),
        ("{self_draft: layers, self_layers: 1.0}", "self_layers  expected less than 1"),
        ("on", "expected"),
    ],
)
def test_what_cannot_be_is_told_at_its_place(tmp_path: Path, line: str, message: str) -> None:
    """Numbers out of bounds, names that are none, proposers without what they need."""
    assert message in told(tmp_path, f"  speculation: {line}")


def test_a_draft_is_found_like_a_model_and_pocket_has_one(tmp_path: Path) -> None:
    """Beside the policy file, on the hub, or the one that ships."""
    shutil.copytree(pocket_folder("draft"), tmp_path / "mine")
    for name, folder in (
        ("pocket", pocket_folder("draft")),
        ("mine", tmp_path / "mine"),
        ("owner/name", "owner/name"),
    ):
        runtime = loaded(tmp_path, f"  speculation: {{draft: {name}}}")
        assert resolve_draft(tmp_path / "policy.yaml", runtime) == folder
    assert resolve_draft(tmp_path / "policy.yaml", loaded(tmp_path)) is None


def test_a_draft_that_is_missing_or_too_large_is_told_at_its_line(tmp_path: Path) -> None:
    """Before a worker starts: no such folder, one without weights, the target itself."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shutil.copytree(pocket_folder("target"), tmp_path / "large")
    for name, why in (
        ("./none", "no such folder"),
        ("empty", "has no weights"),
        ("large", "a draft has to be smaller"),
    ):
        runtime = loaded(tmp_path, "  speculation:", f"    draft: {name}")
        with pytest.raises(PolicyError, match=why) as caught:
            resolve_draft(tmp_path / "policy.yaml", runtime)
        assert f"{tmp_path / 'policy.yaml'}:5:12  runtime.speculation.draft" in str(caught.value)


def test_a_draft_is_measured_by_its_weights_and_not_by_their_bytes(tmp_path: Path) -> None:
    """One kept in fp32 is no larger than its target in bf16; a file that cannot be read, or one of
    packed integers, is left to whoever loads it."""
    shutil.copytree(pocket_folder("draft"), tmp_path / "mine")

    def resolved(content: bytes) -> bool:
        (tmp_path / "mine" / "model.safetensors").write_bytes(content)
        runtime = loaded(tmp_path, "  speculation: {draft: mine}")
        return resolve_draft(tmp_path / "policy.yaml", runtime) == tmp_path / "mine"

    def file(rows: int, dtype: str, size: int) -> bytes:
        tensor = {"dtype": dtype, "shape": [rows, 64], "data_offsets": [0, rows * 64 * size]}
        header = json.dumps({"__metadata__": {}, "embed": tensor}).encode()
        return len(header).to_bytes(8, "little") + header + bytes(rows * 64 * size)

    target = pocket_folder("target") / "model.safetensors"
    assert len(file(50_000, "F32", 4)) > target.stat().st_size
    assert resolved(file(50_000, "F32", 4))
    with pytest.raises(PolicyError, match="has 6,400,000 weights, the model 5,180,672"):
        resolved(file(100_000, "BF16", 2))
    assert resolved(file(100_000, "I32", 0))
    for broken in (
        b"",
        b"no header",
        (2**63).to_bytes(8, "little") + b"{}",
        b"\2" + bytes(7) + b"[]",
    ):
        assert resolved(broken)


def test_a_tier_that_no_request_can_be_of_is_told_where_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken, and guessed for nobody. The file's gateway says which tiers there are; without
    one the file may be of a runtime behind another gateway, and only `headgate serve`, which runs
    its gateway with the tiers that ship, refuses it."""
    lines = ("  speculation:", "    tiers: {chat: off, btch: off, batch: auto}")
    own = write(tmp_path, *lines, "gateway: {tiers: {chat: {ttft_ms: 900}}}")
    wrong = f"{own}:5:30  runtime.speculation.tiers.btch  there is no tier 'btch'; expected one of "
    (problem,) = tier_problems(own, load(own))
    expected = "interactive, standard, relaxed, batch, chat; did you mean 'batch'?"
    assert str(problem) == wrong + expected
    assert check_files([own]) == 2
    assert str(problem) in capsys.readouterr().err
    with pytest.raises(PolicyError, match="there is no tier 'btch'"):
        plan(own)
    own.write_text(own.read_text().replace("btch: off, ", ""))
    assert tier_problems(own, load(own)) == []

    behind = write(tmp_path, *lines)
    assert tier_problems(behind, load(behind)) == []
    assert check_files([behind]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{behind}  ok"
    assert [line.split("  ")[1] for line in said[1:]] == [
        f"runtime.speculation.tiers.{name}" for name in ("chat", "btch")
    ]
    assert all(line.endswith("right only behind a gateway that has it") for line in said[1:])
    with pytest.raises(PolicyError, match="there is no tier 'chat'"):
        plan(behind)


def test_a_model_that_is_not_served_is_told_where_it_is_named(tmp_path: Path) -> None:
    """It was taken, and guessed for nobody; adapters are models of their own."""
    (tmp_path / "adapters" / "polite").mkdir(parents=True)
    for served in ("", "  adapters: ./adapters"):
        file = write(tmp_path, "  speculation:", "    models: {polit: off, pocket: off}", served)
        runtime = load(file).runtime
        assert runtime is not None
        (problem,) = guess_problems(file, runtime)
        near = "; did you mean 'polite'?" if served else ""
        names = "'pocket', 'polite'" if served else "'pocket'"
        assert str(problem) == (
            f"{file}:5:21  runtime.speculation.models.polit  there is no model 'polit'; served: "
            f"{names}{near}"
        )
        assert check_files([file]) == 2
    file.write_text(file.read_text().replace("polit:", "polite:"))
    assert check_files([file]) == 0
