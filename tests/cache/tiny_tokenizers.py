"""Small tokenizers of every kind that models come with, written as ordinary model folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = """Once upon a time there was a little cat, and the cat said hello to the whole wide world.
The user asked: what is two plus two? The assistant said four, and the system said nothing at all.
Well then, naïve café owners in 你好世界 said 🙂 to the user; im start, im end, begin of text."""
CHARACTERS = sorted(
    {char for char in WORDS if char not in "\n "} | set("ABCDEFGHIJKLMNOPQRSTUVW<>|/_")
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = [
    AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")
]
PLAIN = [
    AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>", "<x>")
]


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3: bytes in a printable alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False), *CONTROL])
    tokenizer.add_tokens(PLAIN)
    return tokenizer


def byte_fallback(normalize: bool) -> Tokenizer:
    """As Llama 2 and Mistral: SentencePiece BPE; the space before a text by either of two means."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    learned.train_from_iterator([WORDS.replace("你", "").replace("🙂", "")], trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*sorted(model["vocab"], key=model["vocab"].__getitem__), "\u2581\u2581", "\u2581<"]
    merges = [*map(tuple, model["merges"]), ("\u2581", "\u2581"), ("\u2581", "<")]
    pieces += [char for char in {*"<"} if char not in pieces]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    if normalize:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = [AddedToken(name, special=True, normalized=False) for name in pieces[:3]]
    tokenizer.add_special_tokens([*special, *CONTROL])
    tokenizer.add_tokens(PLAIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece Unigram models: no bytes, unknown characters are lost, NFKC first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=names,
        unk_token="<unk>",
        initial_alphabet=CHARACTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(PLAIN)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback_normalizer": lambda: byte_fallback(normalize=True),
    "byte_fallback_metaspace": lambda: byte_fallback(normalize=False),
    "unigram": unigram,
}


def write_folder(
    folder: Path, tokenizer: Tokenizer, chat_template: object = TEMPLATE, **config: Any
) -> Path:
    """A folder without a model; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    if tokenizer.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_kinds(parent: Path, kinds: Iterable[str] = KINDS) -> dict[str, Path]:
    return {kind: write_folder(parent / kind, KINDS[kind]()) for kind in kinds}
