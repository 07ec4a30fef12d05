"""What a request says about the form of its answer: OpenAI's and vLLM's fields.

Knows their shapes; knows no grammar and no vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, model_validator

TEXT_CHARS_MAX = 16_384  # of a regex or a grammar
ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class Form:
    """A form that is asked for in the request's field `param`.

    `text` is a JSON schema, a regular expression, a JSON list of strings, or a grammar. `lenient`:
    keywords of the schema that cannot be enforced may be left out.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    param: str
    lenient: bool = False


def _schema(value: Any) -> str:
    """A JSON schema's text, whether it came as an object or as a string that holds one."""
    try:
        if isinstance(value, str):
            value = orjson.loads(value)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON schema: an object, or a string that holds one")
        return json.dumps(value)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the schema is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


Schema = Annotated[str, PlainValidator(_schema)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=TEXT_CHARS_MAX)]
Choices = Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(min_length=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class JsonSchema(_Fields):
    """`strict: true` refuses a schema that cannot be enforced in full."""

    name: Annotated[str, Field(strict=True, max_length=256)]
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(_Fields):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema")
        return self

    def forms(self, param: str) -> Iterator[Form]:
        if self.type == "json_object":
            yield Form("json_schema", ANY_OBJECT, param)
        elif self.type == "json_schema" and self.json_schema is not None:
            asked = self.json_schema
            text = asked.schema_ or ANY_OBJECT
            where = f"{param}.json_schema.schema"
            yield Form("json_schema", text, where, lenient=not asked.strict)


class StructuredOutputs(BaseModel):
    """vLLM's field. What else vLLM has in it would change the answer, so it is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: StrictBool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> StructuredOutputs:
        if not any(True for _ in self.forms("")):
            raise ValueError("expected one of json, regex, choice, grammar and json_object")
        return self

    def forms(self, param: str) -> Iterator[Form]:
        if self.json_ is not None:
            yield Form("json_schema", self.json_, f"{param}.json")
        if self.regex is not None:
            yield Form("regex", self.regex, f"{param}.regex")
        if self.choice is not None:
            yield Form("choice", json.dumps(self.choice), f"{param}.choice")
        if self.grammar is not None:
            yield Form("grammar", self.grammar, f"{param}.grammar")
        if self.json_object:
            yield Form("json_schema", ANY_OBJECT, f"{param}.json_object")


class Formed(_Fields):
    """The fields by which a request can ask for a form, the older ones of vLLM too."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    def forms(self) -> Iterator[Form]:
        """All that are asked for; a request should have one at most."""
        if self.response_format is not None:
            yield from self.response_format.forms("response_format")
        if self.structured_outputs is not None:
            yield from self.structured_outputs.forms("structured_outputs")
        if self.guided_json is not None:
            yield Form("json_schema", self.guided_json, "guided_json")
        if self.guided_regex is not None:
            yield Form("regex", self.guided_regex, "guided_regex")
        if self.guided_choice is not None:
            yield Form("choice", json.dumps(self.guided_choice), "guided_choice")
        if self.guided_grammar is not None:
            yield Form("grammar", self.guided_grammar, "guided_grammar")
