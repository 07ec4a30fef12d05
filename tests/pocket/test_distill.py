"""A draft learns what its target says, from prompts in the forms that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocket.distill import (
    Answered,
    PromptsUnusable,
    acceptance,
    answer_all,
    batches,
    load,
    loss_of,
    main,
    new_draft,
    pack,
    read_prompts,
)
from tests.runtime.tiny_models import FAMILIES, write_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


def test_prompts_come_as_chats_as_text_and_as_recorded_requests(folder, tmp_path):
    """Three forms, plain or gzipped; a line that is none of them is named."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [chat, {"prompt": "hi"}, {"t_ms": 0, "body": {"model": "x", **chat}}]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    read = list(read_prompts(plain, tokenizer))
    assert read == list(read_prompts(zipped, tokenizer))
    assert read[0] == read[2]
    assert tokenizer.decode(read[0]) == "<user>hi<bot>"
    assert tokenizer.decode(read[1]) == "hi"
    for wrong in ('{"text": "hi"}', "[]", '{"prompt": 5}', "hi"):
        plain.write_text(json.dumps(chat) + "\n" + wrong)
        with pytest.raises(PromptsUnusable, match=r"a.jsonl:2 is no prompt"):
            list(read_prompts(plain, tokenizer))


def test_answers_are_the_targets_own(folder):
    """Each prompt's greedy answer, whatever its neighbours in the batch are."""
    target = load(folder, "cpu")
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    together = {tuple(one.prompt): one.answer for one in answer_all(target, prompts, 8, 0.0, 3)}
    for prompt in prompts:
        alone = answer_all(target, [prompt], 8, 0.0, 1)[0].answer
        assert together[tuple(prompt)] == alone
        assert 1 <= len(alone) <= 8


def test_a_draft_that_is_its_target_is_always_accepted(folder):
    """And its loss is nothing; a new one is worse in all."""
    target = load(folder, "cpu")
    rows = answer_all(target, [[5, 6, 7], [8, 9]], 8, 0.0, 2)
    same = acceptance(target, target, rows, 1)
    assert same.first_choice == 1
    assert same.drawn == pytest.approx(1, abs=1e-5)
    assert loss_of(target, target, pack(rows, target.device)).item() == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    other = new_draft(target, 32, 1)
    assert acceptance(target, other, rows, 2).drawn < 0.9
    assert loss_of(target, other, pack(rows, target.device)).item() > 0


def test_batches_have_every_row_and_keep_their_size():
    """Within an epoch each row comes once; only a row that is longer by itself exceeds a batch."""
    import random

    rows = [Answered([1] * size, [2]) for size in (3, 60, 5, 9, 200, 30, 31, 8)]
    made = batches(rows, 64, random.Random(0))
    seen: list[int] = []
    while len(seen) < len(rows):
        batch = next(made)
        longest = max(len(row.prompt) + 1 for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= 64
        seen += [id(row) for row in batch]
    assert sorted(seen) == sorted(map(id, rows))


def test_distilling_raises_acceptance_and_writes_an_ordinary_folder(folder, tmp_path, capsys):
    """From nothing, on prompts of one kind: what is held out is accepted more often."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "abcdefgh"[at % 8] * (1 + at % 3)} for at in range(48)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "draft"
    wish = ["--target", folder, "--prompts", prompts, "--out", out, "--json", "--steps", 60]
    more = ["--hidden", 32, "--layers", 1, "--new-tokens", 8, "--rate", 0.01, "--batch-tokens", 512]
    assert main([str(one) for one in (*wish, *more)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["prompts"] == 48
    assert report["after"]["drawn"] > report["before"]["drawn"] + 0.1
    draft = AutoModelForCausalLM.from_pretrained(out)
    assert draft.config.vocab_size == 260
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_cannot_be_distilled_is_refused(folder, tmp_path):
    """No prompts, a draft as large as its target, a folder that is none."""
    with pytest.raises(SystemExit):
        main(["--target", str(folder), "--out", str(tmp_path)])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n' * 3)
    wish = ["--prompts", str(prompts), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no smaller than its target"):
        main(["--target", str(folder), "--draft", str(folder), *wish])
    with pytest.raises(SystemExit, match="holds no config"):
        main(["--target", str(tmp_path), *wish])
