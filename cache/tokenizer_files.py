"""What the small files of a model folder say about its tokenizer: names, ids, chat templates.

Knows file names and their older spellings; opens no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip  # one short list


class TokenizerUnusable(Exception):
    """A model folder whose tokenizer cannot be used: which file, what is wrong, what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerUnusable(
            f"{path} is not valid JSON: {error}; fetch the file again"
        ) from None
    if not isinstance(data, dict):
        raise TokenizerUnusable(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like: tokenizer_config.json; special_tokens_map.json in older folders."""
    merged = {**config, **({} if "added_tokens_decoder" in config else older)}
    special = {}
    for name in NAMED_TOKENS:
        token = merged.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special[name] = content
    return special


def eos_ids(folder: Path, named: int | None) -> frozenset[int]:
    """Ids that end a generation: generation_config.json, else config.json; and eos_token itself."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            break
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in [*ids, named] if isinstance(token_id, int))


def template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files come before tokenizer_config.json, as in transformers.

    Raises TokenizerUnusable for a template that is not text.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    try:
        sources = {n: path.read_text("utf-8") for n, path in files.items() if path.is_file()}
    except UnicodeDecodeError as error:
        raise TokenizerUnusable(f"{folder}: a chat template is not UTF-8: {error}") from None
    if sources:
        return sources
    where, found = "tokenizer_config.json", config.get("chat_template")
    if found is None:
        where = "chat_template.json"
        found = read_json(folder / where).get("chat_template")
    match found:
        case None:
            return {}
        case str():
            return {"default": found}
        case list():
            found = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
    if not isinstance(found, dict) or not all(isinstance(s, str) for s in found.values()):
        raise TokenizerUnusable(f"{folder / where}: chat_template must be text, or texts by name")
    return found
