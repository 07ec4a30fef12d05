"""Every format that recorded traffic comes in, and what is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from evals.filler import BLOCK_TOKENS, Filler
from evals.rows import TraceError
from evals.traces import read_trace

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")


def written(folder: Path, name: str, *lines: Any) -> Path:
    file = folder / name
    text = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def test_mooncakes_rows_are_spread_between_the_ticks_of_its_clock(tmp_path: Path) -> None:
    """Its timestamps are whole multiples of 3 s, which would make bursts that never were."""
    lengths = {"input_length": 600, "output_length": 5}
    ticks = [
        {"timestamp": at, **lengths, "hash_ids": ids}
        for at, ids in ((0, [0, 1]), (0, [0, 2]), (0, [0, 1]), (3000, [0]), (3000, [0]))
    ]
    trace = read_trace(written(tmp_path, "moon.jsonl", *ticks))
    assert trace.format == "mooncake"
    assert [row.t_s for row in trace.rows] == [0, 1, 2, 3, 3]
    assert [row.cluster for row in trace.rows] == ["block-1", "block-2", "block-1", "", ""]


def test_equal_blocks_become_equal_words_at_equal_places() -> None:
    """So that a prefix cache finds what it found in production; the rest is a row's own."""
    filler = Filler(per_word=2.0)
    one = filler.text(1300, (7, 8, 9), "a")
    two = filler.text(1300, (7, 8, 10), "b")
    words = BLOCK_TOKENS // 2
    assert one.split()[: 2 * words] == two.split()[: 2 * words]
    assert one.split()[2 * words :] != two.split()[2 * words :]
    assert len(one.split()) == 650
    assert filler.text(1300, (7, 8, 9), "c") == one
    assert filler.text(100, (), "a") != filler.text(100, (), "b")


def test_lengths_become_a_request_that_asks_for_as_much(tmp_path: Path) -> None:
    """Less what the template adds, scaled where that is wanted."""
    file = written(
        tmp_path, "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )  # fmt: skip
    trace = read_trace(file)
    assert (trace.format, trace.needs_filler) == ("azure", True)
    first, second = trace.items(Filler(1.5, 14.0, 0.5), "m")
    assert second.meta["t_s"] == pytest.approx(4.3145790)
    assert first.body["model"] == "m"
    assert first.body["max_tokens"] == 22
    assert first.body["ignore_eos"] is True
    assert len(first.body["messages"][0]["content"].split()) == round((374 * 0.5 - 14) / 1.5)
    assert first.id != second.id
    assert first.cluster == first.id


def test_tables_are_known_by_their_columns(tmp_path: Path) -> None:
    """BurstGPT's failed requests, whose answers have 0 tokens, are left out."""
    burst = written(
        tmp_path, "burst.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,GPT-4,1087,0,1087,API log",
        "118,GPT-4,417,276,693,API log",
    )  # fmt: skip
    serve = written(
        tmp_path, "serve.csv", "t_s,client,input_tokens,output_tokens", "1.5,50,565,723"
    )
    trace = read_trace(burst)
    assert trace.format == "burstgpt"
    assert [(row.t_s, row.prompt_tokens, row.output_tokens) for row in trace.rows] == [
        (0, 472, 18), (113, 417, 276)
    ]  # fmt: skip
    assert trace.rows[0].meta == {"tenant": "ChatGPT"}
    (row,) = read_trace(serve).rows
    assert (row.meta, row.prompt_tokens, row.output_tokens) == ({"tenant": "50"}, 565, 723)


def test_whole_requests_go_out_as_they_were(tmp_path: Path) -> None:
    """With what is known of them; a packed file is the same file."""
    ask = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "top_p": 0.5}
    rows = [
        {"t_ms": 1500, "tenant": "a", "tier": "batch", "body": ask, "id": "x", "session": "s"},
        {"t_s": 1.0, "body": {"model": "m", "prompt": "p"}, "cluster": "c", "expected": "e"},
    ]
    plain = written(tmp_path, "ours.jsonl", *rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "packed.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    early, late = read_trace(plain).items(Filler())
    assert (late.id, late.body, late.tier, late.cluster) == ("x", ask, "batch", "s")
    assert (late.meta["t_s"], late.meta["tenant"], late.meta["session"]) == (0.5, "a", "s")
    assert (early.cluster, early.expected, early.meta["t_s"]) == ("c", "e", 0)
    for packed in ("packed.jsonl.gz", "packed.jsonl.zst"):
        assert [row.body for row in read_trace(tmp_path / packed).rows] == [
            row.body for row in read_trace(plain).rows
        ]
    (other,) = read_trace(written(tmp_path, "m.jsonl", rows[0])).items(Filler(), "other")
    assert other.body["model"] == "other"


def test_a_folder_is_one_trace(tmp_path: Path) -> None:
    """As the recorder leaves its files; nothing else in it is read."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    written(tmp_path, "b.jsonl", {"t_s": 2, "body": body})
    written(tmp_path, "a.jsonl", {"t_s": 1, "body": body}, {"t_s": 4, "body": body})
    written(tmp_path, "notes.txt", "not this")
    trace = read_trace(tmp_path)
    assert [row.t_s for row in trace.rows] == [0, 1, 3]
    assert trace.digest != read_trace(tmp_path / "a.jsonl").digest


def test_requests_that_begin_alike_are_a_cluster(tmp_path: Path) -> None:
    """Questions about one document do not count as independent of each other."""
    system = {"role": "system", "content": "Answer."}

    def asked(text: str) -> dict[str, Any]:
        return {"t_s": 0, "body": {"messages": [system, {"role": "user", "content": text}]}}

    document = "Document: " + "w " * 200
    rows = (asked(document + "Who?"), asked(document + "When?"), asked("Other"))
    one, two, three = read_trace(written(tmp_path, "t.jsonl", *rows)).rows
    assert one.cluster == two.cluster != three.cluster


def test_a_window_begins_anew_and_keeps_ids(tmp_path: Path) -> None:
    """Ids say where in the whole file a request was."""
    lines = [f"{second},1,10,10" for second in range(5)]
    file = written(tmp_path, "t.csv", "t_s,client,input_tokens,output_tokens", *lines)
    window = read_trace(file).window(2.0, 4.0, 1)
    assert [(row.t_s, row.id) for row in window.rows] == [(0.0, "t-000002")]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"timestamp": 0, "input_lenght": 2}'], "did you mean 'input_length'"),
        (["a,b,c"], "is in none of the formats"),
        (['{"t_ms": 0, "body": {"model": "m"}}'], ":1  body: expected a request"),
        (['{"t_ms": -1, "body": {"prompt": "p"}}'], ":1  t_ms: expected a number of at least 0"),
        (['{"body": {"prompt": "p"}}'], ":1  t_s: missing"),
        (['{"t_ms": 0, "body": {"prompt": "p"}}', "{oh"], ":2  is not JSON"),
        (['{"timestamp": 0, "input_length": "x", "output_length": 1}'], "input_length: expected"),
        (["t_s,client,input_tokens,output_tokens", "x,1,2,3"], ":2  t_s: expected a moment"),
        (["t_s,client,input_tokens,output_tokens"], "has no request in it"),
        ([""], "is empty"),
        (
            ['{"t_ms": 0, "id": "a", "body": {"prompt": "p"}}'] * 2,
            "has the id 'a' twice",
        ),
        (['{"span_id": "1", "attributes": {"gen_ai.operation.name": "chat"}}'], "gen_ai.input"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], problem: str
) -> None:
    with pytest.raises(TraceError) as error:
        read_trace(written(tmp_path, "t.jsonl", *lines))
    assert problem in str(error.value)
    assert "t.jsonl" in str(error.value)


def test_what_cannot_be_read_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-4])
    (tmp_path / "bad.jsonl").write_bytes(b'{"t_s": 1}\n\xff')
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("cut.gz", "unpacked"), ("bad.jsonl", "bad.jsonl:2  is not UTF-8"),
        ("none", "No such file"), ("empty", "without a .jsonl file"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=problem):
            read_trace(tmp_path / name)


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind", "rows", "recorded_s"),
    [
        ("traces/mooncake_conversation_00-40min.jsonl.gz", "mooncake", 7851, 2397),
        ("traces/azure_llm_2023_conv.csv.gz", "azure", 19366, 3502),
        ("traces/servegen_deepseek-r1_60min_sampled.csv.gz", "servegen", 25775, 3600),
        ("replay/requests.jsonl.gz", "headgate", 2000, 314),
    ],
)
def test_the_public_traces_are_read_whole(
    name: str, kind: str, rows: int, recorded_s: float
) -> None:
    trace = read_trace(SHARED / name)
    assert (trace.format, len(trace.rows)) == (kind, rows)
    assert trace.spans_s == pytest.approx(recorded_s, abs=2)
