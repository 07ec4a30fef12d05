"""Trains a draft for any target on the target's own answers to your prompts.

    python -m pocket.distill --target FOLDER --prompts traffic.jsonl --out FOLDER
    python -m pocket.distill --target pocket/target --draft pocket/draft --tasks 200 --out DRAFT

Prompts are lines of JSON, plain or gzipped: {"messages": [...]}, {"prompt": "..."}, or a recorded
request with either of them in its "body". The target answers them; the draft then learns the
target's law at every place of those answers (forward KL), and what a tenth of the prompts tells,
which it never saw, is reported before and after: how often the draft's first choice is the token
that the target said, and how often a drawn guess would be accepted (the sum of min(p, q)). Without
--draft a new small Llama is made. It knows nothing of the rest of the project.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

WARMUP_STEPS = 20
HELD_OUT = 10  # one prompt of so many
REPORT_S = 20.0


class PromptsUnusable(Exception):
    """A line of a file of prompts is none; the message says which, and what one looks like."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and what the target said to it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Over answer tokens: the draft's first choice is what was said; a drawn guess is accepted."""

    tokens: int
    first_choice: float
    drawn: float


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each line's prompt. Raises PromptsUnusable."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                yield prompt_ids(data.get("body", data), tokenizer)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise PromptsUnusable(
                    f'{file}:{number} is no prompt ({error}); expected {{"messages": [...]}}, '
                    '{"prompt": "..."}, or one of them in a "body"'
                ) from None


def prompt_ids(data: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if "messages" in data:
        text = tokenizer.apply_chat_template(
            data["messages"], tools=data.get("tools"), tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(str(text), add_special_tokens=False))
    if not isinstance(data["prompt"], str):
        raise TypeError("prompt is not a text")
    return list(tokenizer.encode(data["prompt"]))


def task_prompts(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[list[int]]:
    """`count` training rows of each of pocket's tasks."""
    from pocket.scoring import encode_row
    from pocket.tasks import TASKS, rows

    return [
        encode_row(tokenizer, row)[0] for task in TASKS for row in rows(task, "train", seed, count)
    ]


# ---- the target's answers ------------------------------------------------------------------------


@torch.no_grad()
def answer_all(
    target: Any, prompts: list[list[int]], new_tokens: int, temperature: float, batch_rows: int
) -> list[Answered]:
    """What the target says to each prompt, those of similar length together."""
    ends = _end_ids(target)
    pad = next(iter(ends))
    answered: list[Answered] = []
    ordered = sorted(prompts, key=len)
    for at in range(0, len(ordered), batch_rows):
        batch = ordered[at : at + batch_rows]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in batch])
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {}
        written = target.generate(
            ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            **({"do_sample": False} | drawn),
        )
        for prompt, row in zip(batch, written[:, length:].tolist(), strict=True):
            end = next((place for place, one in enumerate(row) if one in ends), len(row) - 1)
            answered.append(Answered(prompt, row[: end + 1]))
    return answered


def _end_ids(target: Any) -> list[int]:
    ends = target.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [0 if ends is None else int(ends)]


# ---- laws at the answers' places -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """ids [B, T], padded on the right; `places` [P] are flat positions that predict answers."""

    ids: Tensor
    places: Tensor
    said: Tensor  # [P] the tokens that came there


def pack(rows: list[Answered], device: torch.device) -> Batch:
    length = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    places: list[int] = []
    for number, row in enumerate(rows):
        whole = row.prompt + row.answer
        ids[number, : len(whole)] = torch.tensor(whole)
        first = number * length + len(row.prompt) - 1
        places += range(first, first + len(row.answer))
    said = torch.tensor([token for row in rows for token in row.answer])
    return Batch(ids.to(device), torch.tensor(places).to(device), said.to(device))


def logits_at(model: Any, batch: Batch) -> Tensor:
    """[P, V] in fp32."""
    hidden: Tensor = model.base_model(batch.ids, use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.places])
    return logits.float()


@torch.no_grad()
def acceptance(target: Any, draft: Any, rows: list[Answered], batch_rows: int) -> Acceptance:
    same, drawn, tokens = 0.0, 0.0, 0
    for at in range(0, len(rows), batch_rows):
        batch = pack(rows[at : at + batch_rows], target.device)
        p, q = logits_at(target, batch), logits_at(draft, batch)
        size = min(p.shape[1], q.shape[1])
        both = torch.minimum(p.softmax(-1)[:, :size], q.softmax(-1)[:, :size])
        drawn += float(both.sum())
        same += float((q.argmax(-1) == batch.said).sum())
        tokens += len(batch.said)
    return Acceptance(tokens, same / tokens, drawn / tokens)


def loss_of(target: Any, draft: Any, batch: Batch) -> Tensor:
    """KL from the target's law to the draft's, a mean over the answers' places."""
    with torch.no_grad():
        p = logits_at(target, batch)
    q = logits_at(draft, batch)
    size = min(p.shape[1], q.shape[1])
    return functional.kl_div(
        q[:, :size].log_softmax(-1),
        p[:, :size].log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


# ---- training ------------------------------------------------------------------------------------


def batches(
    rows: list[Answered], batch_tokens: int, rng: random.Random
) -> Iterator[list[Answered]]:
    """Rows without end, of similar length in a batch, at most `batch_tokens` with their padding."""
    while True:
        order = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer) + rng.uniform(0, 40))
        made: list[list[Answered]] = [[]]
        longest = 0
        for row in order:
            longest = max(longest, len(row.prompt) + len(row.answer))
            if made[-1] and longest * (len(made[-1]) + 1) > batch_tokens:
                made.append([])
                longest = len(row.prompt) + len(row.answer)
            made[-1].append(row)
        rng.shuffle(made)
        yield from made


def train(
    target: Any,
    draft: Any,
    rows: list[Answered],
    *,
    steps: int,
    batch_tokens: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW with a warm-up and a straight way down to zero."""
    draft.train(True)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    told = time.monotonic()
    for step, chosen in zip(
        range(steps), batches(rows, batch_tokens, random.Random(seed)), strict=False
    ):
        scale = min(1.0, (step + 1) / WARMUP_STEPS, 1.0 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        loss = loss_of(target, draft, pack(chosen, target.device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - told > REPORT_S:
            print(f"step {step + 1} of {steps}: KL {loss.item():.4f}", flush=True)
            told = time.monotonic()
    draft.train(False)


def new_draft(target: Any, hidden: int, layers: int) -> LlamaForCausalLM:
    """A small Llama with the target's vocabulary and context."""
    config = target.config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 32),
            num_key_value_heads=max(1, hidden // 32),
            head_dim=32,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=getattr(config, "rope_parameters", None),
            tie_word_embeddings=True,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )


def save(draft: Any, target_folder: Path, out: Path) -> None:
    """An ordinary folder: weights in bf16, the target's own tokenizer files."""
    import copy

    copy.deepcopy(draft).bfloat16().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (target_folder / name).is_file():
            (out / name).write_bytes((target_folder / name).read_bytes())


def parse(argv: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--draft", type=Path, help="the draft to go on with (default: a new one)")
    parser.add_argument("--out", type=Path, required=True, help="where the draft is written")
    parser.add_argument("--prompts", type=Path, help="JSONL, plain or .gz")
    parser.add_argument("--tasks", type=int, default=0, help="training rows of each pocket task")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="with their padding")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the target's answers")
    parser.add_argument("--hidden", type=int, default=128, help="of a new draft, in 32s")
    parser.add_argument("--layers", type=int, default=2, help="of a new draft")
    parser.add_argument("--rows", type=int, default=16, help="prompts answered together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON")
    options = parser.parse_args(list(argv) if argv is not None else None)
    if not options.prompts and options.tasks < 1:
        parser.error("give --prompts FILE or --tasks N")
    if options.steps < 1 or options.rows < 1 or options.hidden % 32 or options.hidden < 32:
        parser.error("--steps and --rows are at least 1, --hidden a multiple of 32")
    return options


def load(folder: Path, device: str) -> Any:
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} holds no config.json; expected a Hugging Face folder")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(torch.device(device)).train(False)


def main(argv: Iterable[str] | None = None) -> int:
    options = parse(argv)
    torch.manual_seed(options.seed)
    target = load(options.target, options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    draft = (
        load(options.draft, options.device)
        if options.draft
        else new_draft(target, options.hidden, options.layers).to(options.device)
    )
    if sum(p.numel() for p in draft.parameters()) >= sum(p.numel() for p in target.parameters()):
        raise SystemExit("the draft is no smaller than its target: give fewer --layers or --hidden")
    prompts = task_prompts(tokenizer, options.tasks, options.seed) if options.tasks else []
    try:
        prompts += list(read_prompts(options.prompts, tokenizer)) if options.prompts else []
    except (OSError, PromptsUnusable) as error:
        raise SystemExit(str(error)) from None
    room = target.config.max_position_embeddings - options.new_tokens
    prompts = [one[-room:] for one in prompts if one]
    answered = answer_all(target, prompts, options.new_tokens, options.temperature, options.rows)
    random.Random(options.seed).shuffle(answered)
    held_out, seen = answered[::HELD_OUT], [row for at, row in enumerate(answered) if at % HELD_OUT]
    if not seen:
        raise SystemExit("two prompts are the least: one to learn from and one to tell by")
    before = acceptance(target, draft, held_out, options.rows)
    print(f"before: {before}", flush=True)
    train(
        target,
        draft,
        seen,
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        rate=options.rate,
        seed=options.seed,
    )
    after = acceptance(target, draft, held_out, options.rows)
    save(draft, options.target, options.out)
    report = {"prompts": len(prompts), "before": asdict(before), "after": asdict(after)}
    print(json.dumps(report) if options.json else f"after:  {after}\nwritten: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
