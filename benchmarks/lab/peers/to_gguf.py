"""A Hugging Face folder -> GGUF, for llama.cpp and OpenVINO: FOLDER FILE TYPE.

Runs in llama.cpp's environment, which has the gguf package. llama.cpp's own converter refuses
tokenizers that it does not know by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_MATRIX_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def convert(folder: Path, target: Path, kind: str) -> None:
    """Writes `target` whole or not at all."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    half = target.with_suffix(".half")
    writer = gguf.GGUFWriter(str(half), config["model_type"])
    _describe(writer, config, _FILE_TYPES[kind])
    _add_tokenizer(writer, folder, config)
    _add_weights(writer, folder, config, _MATRIX_TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    half.rename(target)


def _describe(writer: Any, config: dict[str, Any], file_type: int) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rows = config["vocab_size"]
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for token, id_ in tokenizer["model"]["vocab"].items():
        tokens[id_], types[id_] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    if config["bos_token_id"] is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    writer.add_chat_template(template)


def _add_weights(writer: Any, folder: Path, config: dict[str, Any], matrix_type: Any) -> None:
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[config["model_type"].upper()], config["num_hidden_layers"]
    )
    rotated = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    with safe_open(folder / "model.safetensors", "np") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            weight = weights.get_tensor(key)
            for ending, heads in rotated.items():
                if config["model_type"] == "llama" and key.endswith(ending):
                    weight = _interleave(weight, heads)
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if weight.ndim == 1 or matrix_type is gguf.GGMLQuantizationType.F32:
                writer.add_tensor(name, weight.astype(np.float32))
                continue
            packed = gguf.quants.quantize(weight, matrix_type)
            writer.add_tensor(name, packed, raw_dtype=matrix_type)


def _interleave(weight: Any, heads: int) -> Any:
    """[H * D, in]: transformers rotates halves of a head, llama.cpp's llama neighbouring rows."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
