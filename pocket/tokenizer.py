"""The tokenizer: byte-level BPE with single digits and a ChatML template.

    python -m pocket.tokenizer --out pocket/target

Trained on train rows and on the docstrings of Python's own library as a sample of English.
Byte-level pieces make any UTF-8 text survive a round trip.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pocket.desks import DESKS
from pocket.tasks import TASKS, rows

VOCABULARY = 4096
CONTEXT = 2048
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}
{%- elif content %}{% for part in content if part.text is defined %}{{ part.text }}{% endfor %}
{%- endif %}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
<|im_start|>system
{% if first_is_system %}{{ text(messages[0].content) }}

{% endif -%}
Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
Call one with <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>
{% elif first_is_system -%}
<|im_start|>system
{{ text(messages[0].content) }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if not (loop.first and first_is_system) -%}
<|im_start|>{{ message.role }}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
<tool_call>{"name": {{ function.name | tojson }}, "arguments": {{ function.arguments if \
function.arguments is string else function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def _docstrings() -> Iterator[str]:
    """The docstrings of the standard library, in a stable order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def training_texts(rows_per_task: int = 4000) -> Iterator[str]:
    """What the tokenizer is trained on."""
    yield from _docstrings()
    for desk in DESKS:
        yield from [desk] * 20
    for task in TASKS:
        count = rows_per_task // 4 if task == "find" else rows_per_task
        for row in rows(task, "train", seed=1, count=count):
            for message in row.messages:
                if message["role"] != "system":
                    yield message["content"]
            yield row.answer
            yield from map(str, row.tools or [])


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer of `VOCABULARY` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # A name or a code has the same pieces after a space, a quote or at the start of an
            # answer: copying it is then the same tokens again.
            pre_tokenizers.Split(Regex(r" (?=[A-Z])|[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,  # the two marks of a tool call are added below
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    # Not special: a client that hides special tokens still has to see the marks of a call.
    wrapped.add_tokens([CALL_START, CALL_END])
    wrapped.chat_template = CHAT_TEMPLATE
    if len(wrapped) != VOCABULARY:
        raise ValueError(f"the tokenizer has {len(wrapped)} entries, expected {VOCABULARY}")
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json` that older transformers read as well."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for local in ("backend", "is_local", "local_files_only"):
        config.pop(local, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [TURN_START])
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer to")
    out: Path = parser.parse_args().out
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, out)
    print(f"{len(tokenizer)} entries written to {out}")


if __name__ == "__main__":
    main()
