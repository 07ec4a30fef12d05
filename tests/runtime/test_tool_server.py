"""Forced calls from models that know nothing, in dialects whose marks are special tokens.

The worker is a real one, over a real socket; the weights are random, so that whatever is right is
the grammar's and the parser's doing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer as Trained

from runtime.tools import DIALECTS, Dialect
from tests.end_to_end.stack import events
from tests.runtime.test_server import serving
from tests.runtime.tiny_models import VOCAB, write_model

TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 9},
                "area": {"enum": ["inside", "terrace"]},
            },
            "required": ["guests"],
            "additionalProperties": False,
        },
    },
}
# dialect -> what else its template shows
CASES = {
    "mistral": "[ARGS]",
    "granite": "",
    "deepseek": "```json",
    "command_r7b": "",
    "glm4_moe": "",
}


def write_folder(folder: Path, dialect: Dialect, shown: str) -> Path:
    """A random model whose tokenizer has the dialect's marks as special tokens."""
    marks = sorted(dialect.markers)
    changes = {"vocab_size": VOCAB + len(marks), "initializer_range": 0.02}
    write_model(folder, "LlamaConfig", changes)
    tokens = Trained.from_file(str(folder / "tokenizer.json"))
    tokens.add_special_tokens(marks)
    tokens.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    says = json.dumps("".join(dialect.marks[0]) + shown, ensure_ascii=False)
    config["chat_template"] = (
        f"{{% if tools %}}{{{{ {says} }}}}{{% endif %}}" + (config["chat_template"])
    )
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_random_model_is_forced_to_right_calls(name: str, tmp_path: Path) -> None:
    """A call each, which obeys its schema; whole and streamed alike; marks are no content."""
    dialect = next(one for one in DIALECTS if one.name == name)
    folder = write_folder(tmp_path / name, dialect, CASES[name])
    asked: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 300,
        "parallel_tool_calls": False,
        "ignore_eos": False,
        "n": 3,
        "seed": 5,
        "temperature": 1.0,
        "stream_options": {"include_usage": True},
    }
    with serving(folder) as world:
        world.until(lambda: world.client.get("/health").status_code == 200)
        whole = world.post(**asked).json()
        chunks = events(world.post(**asked, stream=True).content)
        world.until(world.idle)
    assert chunks[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        assert choice["finish_reason"] == "tool_calls", choice
        message = choice["message"]
        assert message["content"] is None
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == "book"
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, TOOL["function"]["parameters"])  # type: ignore[index]
        deltas = [
            one
            for chunk in chunks[:-2]
            for given in chunk["choices"]
            if given["index"] == choice["index"]
            for one in given["delta"].get("tool_calls", [])
        ]
        streamed = "".join(delta["function"]["arguments"] for delta in deltas)
        assert streamed == call["function"]["arguments"]
        if name == "mistral":  # whose template takes no other ids
            assert len(call["id"]) == 9
            assert call["id"].isalnum()
