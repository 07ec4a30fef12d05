"""A policy's `speculation` -> proposers that are ready to guess, or the reason why there are none.

Knows models, folders and what a draft has to have in common with its target. What is wrong shows
here, before the first request.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cache.tokens import Tokenizer
from policies.schema import Guesses, Runtime, Weights
from runtime.calibrate import Timed, measure_costs
from runtime.choices import Choices
from runtime.costs import StepCosts
from runtime.draft_writer import ModelWriter, SelfWriter
from runtime.lean import lean_step
from runtime.loading import load_model
from runtime.model import Model, ModelRefused
from runtime.self_model import LayersModel
from runtime.speculation import Mode, Modes, Speculation
from runtime.vocabulary import VocabulariesDiffer, Vocabulary, vocabulary_of
from spec_decode.draft import Proposer
from spec_decode.draft_model import DraftModel
from spec_decode.ngram import NGram
from spec_decode.prediction import Prediction
from spec_decode.self_draft import kept_layers
from spec_decode.tree import Tree

# A draft's steps are timed up to this size, for at most so long.
_TIMED_TOKENS = 256
_TIMED_S = 0.5
# A model that shares another's pool has one of its own while it is loaded.
_OWN_TOKENS = 64


def open_speculation(
    runtime: Runtime,
    model: Model,
    tokenizer: Tokenizer,
    draft: Path | str | None,
    source: Path | str,
    served_name: str,
    choices: Choices | None = None,
) -> tuple[Speculation | None, Path | None]:
    """None where nothing is ever to be guessed; and the folder of the draft, where there is one.

    Raises ModelRefused for a draft that cannot do.
    """
    asked = runtime.speculation.asked
    if asked == {"off"}:
        return None, None
    folder: Path | None = None
    proposers: list[Proposer] = []
    if asked & {"auto", "prediction"}:
        proposers.append(Prediction())
    if asked & {"auto", "ngram"}:
        proposers.append(NGram(runtime.speculation.recent_tokens))
    if "tree" in asked:
        if runtime.kv == "int8" or any(model.windows):
            raise ModelRefused(
                "runtime.speculation: proposer tree goes neither with runtime.kv: int8 nor with "
                "sliding windows; take ngram"
            )
        proposers.append(Tree(0))
    if draft is not None and asked & {"auto", "draft"}:
        proposer, folder = _draft_model(runtime, model, tokenizer, draft, choices)
        proposers.append(proposer)
    if runtime.speculation.self_draft is not None and asked & {"auto", "self"}:
        proposers.append(_self_draft(runtime, model, source, choices))
    return Speculation(proposers, modes_of(runtime, served_name)), folder


def modes_of(runtime: Runtime, served_name: str) -> Modes:
    """Who guesses for whom; the model itself goes by the empty name, adapters by theirs."""
    policy = runtime.speculation
    return Modes(
        _mode(policy),
        {name: _mode(one) for name, one in policy.tiers.items()},
        {"" if name == served_name else name: _mode(one) for name, one in policy.models.items()},
    )


def _mode(guesses: Guesses) -> Mode:
    return Mode(guesses.proposer, guesses.max_tokens)


def _draft_model(
    runtime: Runtime,
    model: Model,
    tokenizer: Tokenizer,
    source: Path | str,
    choices: Choices | None,
) -> tuple[DraftModel, Path]:
    draft, folder = load_model(
        source,
        kv_tokens=runtime.kv_tokens,
        device=runtime.device,
        dtype=runtime.dtype,
        compiles=runtime.compile == "auto",
        choices=choices,
    )
    if draft.parameters >= model.parameters:
        raise ModelRefused(
            f"runtime.speculation.draft: {folder} has {draft.parameters:,} parameters, the model "
            f"{model.parameters:,}: a draft has to be smaller, or guessing costs more than it saves"
        )
    if draft.context_tokens < min(model.context_tokens, runtime.context_tokens or 2**30):
        raise ModelRefused(
            f"runtime.speculation.draft: {folder} was trained for {draft.context_tokens} tokens, "
            f"the model for {model.context_tokens}: set runtime.context_tokens to the lower one, "
            "or take another draft"
        )
    try:
        vocabulary = vocabulary_of(
            tokenizer, Tokenizer.load(folder), model.vocab_size, draft.vocab_size
        )
    except VocabulariesDiffer as error:
        raise ModelRefused(
            f"runtime.speculation.draft: {folder} writes with other tokens: {error}; take a draft "
            "of the same family"
        ) from None
    if draft.decoder is None:
        draft.decoder = lean_step(draft)
    costs = _timed(runtime, draft)
    return DraftModel(ModelWriter(draft, model.blocks, costs, vocabulary)), folder


def _self_draft(
    runtime: Runtime, model: Model, source: Path | str, choices: Choices | None
) -> DraftModel:
    if runtime.kv == "int8":
        raise ModelRefused("runtime.speculation.self_draft does not go with runtime.kv: int8")
    if runtime.speculation.self_draft == "layers":
        kept = kept_layers(len(model.windows), runtime.speculation.self_layers)
        cheaper: Timed = LayersModel(model, kept)
    else:
        rounded, _ = load_model(
            source,
            kv_tokens=_OWN_TOKENS,
            device=runtime.device,
            dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[model.dtype],
            weights=Weights(attention="w8a8", mlp="w8a8", head="w8a8"),
            revision=runtime.revision,
            compiles=runtime.compile == "auto",
            choices=choices,
        )
        rounded.share_pool(model)
        cheaper = rounded
    costs = _timed(runtime, cheaper)
    writer = SelfWriter(cheaper, model.blocks, costs, Vocabulary(model.vocab_size))
    return DraftModel(writer, "self")


def _timed(runtime: Runtime, model: Timed) -> StepCosts:
    most = min(_TIMED_TOKENS, runtime.step_tokens)
    return measure_costs(model, most, min(runtime.max_sequences, most), budget_s=_TIMED_S)
