"""Models of known geometry with random weights, made on the spot: speed does not depend on values.

Knows transformers and the tokenizer's file format; knows no engine. Every weight is a number that
fp32, bf16 and fp16 all hold exactly, so that engines with different formats have the same model.
Shapes are those of 2-D weights as torch has them, [out, in].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PRINTABLE = [chr(code) for code in range(33, 127)]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_POCKET = Path(__file__).parents[2] / "pocket"
_RECIPE = 1  # raise it when what is made changes, and models are made anew
_SEED = 0
_SPREAD = 0.05  # standard deviation of a weight: large enough that greedy answers do not get stuck


@dataclass(frozen=True, slots=True)
class Geometry:
    """What decides a model's speed."""

    name: str
    family: str  # transformers' model type: llama, qwen2
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool
    context: int = 4096


# runtime.md's 252 M Llama, Qwen2.5-0.5B, and a model so small that overhead rules.
LLAMA_252M = Geometry("llama-252m", "llama", 20, 1024, 16, 8, 2816, 8192, tied=False)
QWEN_05B = Geometry("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 4864, 151936, tied=True)
LLAMA_22M = Geometry("llama-22m", "llama", 10, 384, 6, 2, 1024, 8192, tied=False)
# For the test of all this.
TINY = Geometry("tiny", "llama", 2, 64, 4, 2, 128, 8192, tied=False, context=512)


def peers_home() -> Path:
    """Where peers' environments and the models are kept: HEADGATE_PEERS, or the user's cache."""
    chosen = os.environ.get("HEADGATE_PEERS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "headgate" / "peers"


def make(geometry: Geometry, home: Path | None = None) -> Path:
    """The model's folder in Hugging Face's layout, fp32; made when it is not there yet."""
    folder = (home or peers_home()) / "models" / f"{geometry.name}-{_RECIPE}"
    if folder.exists():
        return folder
    half = folder.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    _write_weights(geometry, half)
    write_tokenizer(geometry.vocabulary, half)
    half.rename(folder)
    return folder


def make_pair(home: Path | None = None) -> Path:
    """Folders `target` and `draft` of pocket in fp32, which every engine reads."""
    folder = (home or peers_home()) / "models" / f"pocket-{_pocket_digest()}"
    if not folder.exists():
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        for part in ("target", "draft"):
            _copy_fp32(_POCKET / part, half / part)
        half.rename(folder)
    return folder


def _pocket_digest() -> str:
    weights = ((_POCKET / part / "model.safetensors").read_bytes() for part in ("target", "draft"))
    return hashlib.sha256(b"".join(weights)).hexdigest()[:8]


def _copy_fp32(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")


def matrix_parameters(geometry: Geometry) -> int:
    """Weights of the matrices that every decoded token is multiplied with, the head included."""
    head_dim = geometry.hidden // geometry.heads
    attention = 2 * geometry.hidden * head_dim * (geometry.heads + geometry.kv_heads)
    mlp = 3 * geometry.hidden * geometry.inner
    return geometry.layers * (attention + mlp) + geometry.hidden * geometry.vocabulary


def _write_weights(geometry: Geometry, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(
        geometry.family,
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.inner,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        max_position_embeddings=geometry.context,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=geometry.tied,
        initializer_range=_SPREAD,
    )
    torch.manual_seed(_SEED)
    auto: Any = AutoModelForCausalLM
    module = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.to(torch.bfloat16).to(torch.float16).float())
    module.save_pretrained(folder)


# ---- tokenizer -----------------------------------------------------------------------------------


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE (GPT-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (code for code in range(256) if code not in printable)
    letters = {code: chr(code) for code in printable}
    letters |= {code: chr(256 + at) for at, code in enumerate(others)}
    return [letters[code] for code in range(256)]


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """Pairs of printable characters in the order of their codes, as many as are wanted or exist."""
    return islice(product(_PRINTABLE, _PRINTABLE), count)


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A byte-level BPE of at most `vocabulary` tokens: special ones, bytes, then pairs of letters.

    Nothing is trained: prompts are token ids, and a text only has to survive both ways.
    """
    letters = _byte_letters()
    merges = list(_merges(vocabulary - len(_SPECIALS) - len(letters)))
    tokens = [*_SPECIALS, *letters, *(left + right for left, right in merges)]
    added = [
        {"id": id_, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id_, token in enumerate(_SPECIALS)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": True},
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIALS[0],
        "eos_token": _SPECIALS[0],
        "pad_token": _SPECIALS[0],
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
