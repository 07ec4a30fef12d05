"""A real trained model for tests: llama2.c's stories260K files -> an ordinary Hugging Face folder.

Formats: `stories260K.bin` is llama2.c's version 0 export, `tok512.bin` its tokenizer export.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE, FIRST_PIECE = 3, 259  # ids 3..258 are the bytes 0..255
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0


def convert(source: Path, target: Path) -> Path:
    """Reads the two files in `source`, writes the model folder `target`, returns it."""
    target.mkdir(parents=True, exist_ok=True)
    config, weights = read_model(source / "stories260K.bin")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", config)
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    write_json(target / "generation_config.json", ends)

    pieces, scores = read_pieces(source / "tok512.bin", config["vocab_size"])
    tokenizer = build_tokenizer(pieces, scores)
    tokenizer.save(str(target / "tokenizer.json"))
    names = {"unk_token": pieces[UNK], "bos_token": pieces[BOS], "eos_token": pieces[EOS]}
    write_json(
        target / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names},
    )
    return target


def read_model(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json, and the weights by their Hugging Face names, float32.

    Shapes: d = dim, h = hidden_dim, l = layers, v = vocab, k = key/value heads x head size.
    """
    data = path.read_bytes()
    d, h, l, heads, kv_heads, v, length = struct.unpack_from("<7i", data)  # noqa: E741  # the legend
    head = d // heads
    k = kv_heads * head
    numbers = np.frombuffer(data, "<f4", offset=28)
    at = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return numbers[at - size : at].reshape(shape)

    weights = {"model.embed_tokens.weight": take(v, d)}
    stacked = {
        "input_layernorm": take(l, d),
        "self_attn.q_proj": half_split(take(l, d, d), head),
        "self_attn.k_proj": half_split(take(l, k, d), head),
        "self_attn.v_proj": take(l, k, d),
        "self_attn.o_proj": take(l, d, d),
        "post_attention_layernorm": take(l, d),
        "mlp.gate_proj": take(l, h, d),
        "mlp.down_proj": take(l, d, h),
        "mlp.up_proj": take(l, h, d),
    }
    weights["model.norm.weight"] = take(d)
    take(2 * length, head // 2)  # rotary tables, which every program computes for itself
    assert at == numbers.size, f"{path} has {numbers.size} numbers, its header says {at}"
    for name, layers in stacked.items():
        for layer in range(l):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(layers[layer])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": v,
        "hidden_size": d,
        "intermediate_size": h,
        "num_hidden_layers": l,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    return config, weights


def half_split(weight: np.ndarray, head: int) -> np.ndarray:
    """[l, heads x head, d] for rotary pairs (2i, 2i+1) -> the same for pairs (i, i + head/2)."""
    layers, rows, width = weight.shape
    pairs = weight.reshape(layers, rows // head, head // 2, 2, width)
    return pairs.transpose(0, 1, 3, 2, 4).reshape(layers, rows, width)


def read_pieces(path: Path, count: int) -> tuple[list[str], list[float]]:
    """Token strings and scores by id; a space is written as SentencePiece's U+2581."""
    data = path.read_bytes()
    pieces, scores, at = [], [], 4
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        pieces.append(data[at : at + length].decode().replace(" ", "\u2581"))
        scores.append(score)
        at += length
    assert at == len(data), f"{path} has {len(data)} bytes, {count} tokens end at {at}"
    return pieces, scores


def build_tokenizer(pieces: list[str], scores: list[float]) -> Tokenizer:
    """Greedy merging of the best-scored pair, as ranked merges: a pair ranks by what it makes.

    The file calls BOS and EOS "\\n<s>\\n" and "\\n</s>\\n", so that a text's "<s>" is plain text.
    """
    ids = {piece: at for at, piece in enumerate(pieces)}
    assert len(ids) == len(pieces), "two tokens with one name"
    merges = []
    for piece in sorted(pieces[FIRST_PIECE:], key=lambda piece: -scores[ids[piece]]):
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in parts if left in ids and right in ids]
    for byte in range(256):
        assert pieces[FIRST_BYTE + byte] == f"<0x{byte:02X}>"

    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=pieces[UNK], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(pieces[at], normalized=False, special=True) for at in (UNK, BOS, EOS)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="BOS:0 $A:0",
        special_tokens=[{"id": "BOS", "ids": [BOS], "tokens": [pieces[BOS]]}],
    )
    return tokenizer


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
