"""Makes the target and the draft from scratch: tokenizer, curriculum, weights, folders.

    python -m pocket.train                 both models, resuming where a run was interrupted
    python -m pocket.train --size draft    one of them

Progress goes to the screen and to .pocket/SIZE.log: loss on answers, tokens per second, and every
few minutes exact match per task on held-out rows (another seed than `pocket.evaluate` uses).
Checkpoints are kept in .pocket/ and hold weights, optimizer and position; batches are drawn from
the seed and the number of the step, so that a resumed run sees what an unbroken one would see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pocket.curriculum import LONGEST_ROW, Scribe, draw_batch
from pocket.induction import plant
from pocket.model import SIZES, assert_parity, build, hidden_states
from pocket.muon import build_optimizers
from pocket.scoring import forced_matches
from pocket.tasks import TASKS, rows
from pocket.tokenizer import CONTEXT, save_tokenizer, train_tokenizer

HOME = Path(__file__).parent
WORK = HOME.parent / ".pocket"
STEERING_SEED = 1
WARMUP_STEPS = 50
TOKENS = {"target": 13_500_000, "draft": 8_000_000}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made with. `tokens` counts every position of every batch, padding too."""

    size: str
    tokens: int
    batch_tokens: int
    matrix_rate: float
    rest_rate: float
    decay_share: float
    seed: int
    dtype: str
    compiled: bool
    save_every_s: float
    check_every_s: float
    check_rows: int
    work: Path


@dataclass(slots=True)
class Run:
    """A training run between two steps."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def rate_at(progress: float, step: int, decay_share: float) -> float:
    """Warm up, stay, and fall in a straight line to zero over the last `decay_share`."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (1 - progress) / decay_share))


def start(plan: Plan, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Run:
    torch.manual_seed(plan.seed)
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = build(plan.size, len(tokenizer), CONTEXT, pad_id, eos_id)
    plant(model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    assert_parity(model)
    run = Run(model, build_optimizers(model, plan.matrix_rate, plan.rest_rate))
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return run


def checkpoint_path(plan: Plan) -> Path:
    return plan.work / f"{plan.size}.pt"


def save(run: Run, plan: Plan) -> None:
    """Write the checkpoint beside the old one and swap, so that an interruption loses neither."""
    fresh = checkpoint_path(plan).with_suffix(".new")
    torch.save(
        {
            "model": run.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "step": run.step,
            "tokens": run.tokens,
            "seconds": run.seconds,
        },
        fresh,
    )
    fresh.replace(checkpoint_path(plan))


def resume(run: Run, plan: Plan) -> None:
    if not checkpoint_path(plan).exists():
        return
    kept = torch.load(checkpoint_path(plan), map_location=run.model.device, weights_only=True)
    run.model.load_state_dict(kept["model"])
    for optimizer, state in zip(run.optimizers, kept["optimizers"], strict=True):
        peaks = [group["peak"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak
    run.step, run.tokens, run.seconds = kept["step"], kept["tokens"], kept["seconds"]


def advance(
    run: Run, plan: Plan, scribe: Scribe, forward: Callable[[LlamaForCausalLM, Tensor], Tensor]
) -> Tensor:
    """One step: the mean loss over the answers of one batch."""
    progress = run.tokens / plan.tokens
    ids, positions = draw_batch(scribe, f"{plan.seed}/{run.step}", progress, plan.batch_tokens)
    ids, positions = ids.to(run.model.device), positions.to(run.model.device)
    autocast = plan.dtype == "bf16"
    with torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        hidden = forward(run.model, ids).flatten(0, 1)[positions]
        logits = run.model.lm_head(hidden)
    loss = functional.cross_entropy(logits.float(), ids.flatten()[positions + 1])
    torch.autograd.backward(loss)
    scale = rate_at(progress, run.step, plan.decay_share)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    run.tokens += ids.numel()
    return loss.detach()


def check(run: Run, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """Exact match per task on held-out rows, in per cent."""
    shares = {
        task: forced_matches(run.model, tokenizer, list(rows(task, "test", STEERING_SEED, count)))
        for task in TASKS
    }
    scores = {task: 100 * sum(matches) / len(matches) for task, matches in shares.items()}
    mean = sum(scores.values()) / len(scores)
    return f"exact {mean:.1f} | " + " ".join(f"{t} {s:.0f}" for t, s in scores.items())


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights."""
    assert_parity(model)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    copy.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def train(plan: Plan, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """Run `plan` to its end, from its checkpoint if there is one."""
    plan.work.mkdir(parents=True, exist_ok=True)
    run = start(plan, tokenizer, device)
    resume(run, plan)
    scribe = Scribe(tokenizer)
    forward = torch.compile(hidden_states, dynamic=False) if plan.compiled else hidden_states
    log = (plan.work / f"{plan.size}.log").open("a", buffering=1)

    def say(text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {plan.size} step {run.step} {text}"
        print(line, flush=True)
        log.write(line + "\n")

    saved = checked = shown = time.monotonic()
    shown_tokens = run.tokens
    losses: list[float] = []
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    while run.tokens < plan.tokens and not stopped:
        began = time.monotonic()
        losses.append(advance(run, plan, scribe, forward).item())
        now = time.monotonic()
        run.seconds += now - began
        if now - shown > 20:
            speed = (run.tokens - shown_tokens) / (now - shown)
            mean = sum(losses[-20:]) / len(losses[-20:])
            share = run.tokens / plan.tokens
            say(f"{share:6.1%} loss {mean:.3f} {speed:.0f} tokens/s {run.seconds / 60:.1f} min")
            shown, shown_tokens = now, run.tokens
        if now - saved > plan.save_every_s:
            save(run, plan)
            saved = now
        if now - checked > plan.check_every_s:
            say(check(run, tokenizer, plan.check_rows))
            checked = time.monotonic()
    save(run, plan)
    if run.tokens < plan.tokens:
        raise SystemExit(f"interrupted; kept {checkpoint_path(plan)}, run again to go on")
    say(check(run, tokenizer, plan.check_rows))
    say(f"done: {run.tokens} tokens, {run.seconds / 60:.1f} minutes")
    log.close()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer, or a new one where none is shipped yet."""
    folder = HOME / "target"
    if (folder / "tokenizer.json").exists():
        shipped: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
        return shipped
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, folder)
    return tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both", help="which to train")
    parser.add_argument("--tokens", type=int, help="training positions (default: by size)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="positions in a step")
    parser.add_argument("--matrix-rate", type=float, default=0.015, help="learning rate of Muon")
    parser.add_argument("--rest-rate", type=float, default=0.002, help="learning rate of AdamW")
    parser.add_argument("--decay-share", type=float, default=0.4, help="last, cooling share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="bf16 autocast, or plain float32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoint and begin anew")
    parser.add_argument("--export-only", action="store_true", help="write the folders and stop")
    parser.add_argument("--save-every-s", type=float, default=180)
    parser.add_argument("--check-every-s", type=float, default=240)
    parser.add_argument("--check-rows", type=int, default=40, help="held-out rows a task")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HOME, help="where SIZE/ folders are written")
    options = parser.parse_args()
    if options.batch_tokens < LONGEST_ROW:
        parser.error(f"--batch-tokens has to hold one row, at least {LONGEST_ROW}")
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens has to be at least 1")
    if not 0 < options.decay_share <= 1:
        parser.error("--decay-share has to be above 0 and at most 1")
    return options


def main() -> None:
    options = parse()
    torch.set_flush_denormal(True)
    tokenizer = load_tokenizer()
    device = torch.device(options.device)
    for size in SIZES if options.size == "both" else [options.size]:
        plan = Plan(
            size=size,
            tokens=options.tokens or TOKENS[size],
            batch_tokens=options.batch_tokens,
            matrix_rate=options.matrix_rate,
            rest_rate=options.rest_rate,
            decay_share=options.decay_share,
            seed=options.seed,
            dtype=options.dtype,
            compiled=not options.no_compile,
            save_every_s=options.save_every_s,
            check_every_s=options.check_every_s,
            check_rows=options.check_rows,
            work=options.work,
        )
        if options.fresh:
            checkpoint_path(plan).unlink(missing_ok=True)
        if not options.export_only:
            train(plan, tokenizer, device)
        elif not checkpoint_path(plan).exists():
            raise SystemExit(f"nothing to export: {checkpoint_path(plan)} does not exist")
        run = start(plan, tokenizer, torch.device("cpu"))
        resume(run, plan)
        export(run.model, tokenizer, options.out / size)
        print(json.dumps({"exported": str(options.out / size), "tokens": run.tokens}))


if __name__ == "__main__":
    main()
