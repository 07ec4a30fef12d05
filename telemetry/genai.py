"""OpenTelemetry's names for what generative models are asked and answer: the one mapping.

Semantic conventions 1.41, the last in which they stood among the others; what those have no name
for is `headgate.*`, and named where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT, TEXT = "chat", "text_completion"
OPERATION, PROVIDER = "gen_ai.operation.name", "gen_ai.provider.name"
STREAM, STOPS = "gen_ai.request.stream", "gen_ai.request.stop_sequences"
CONVERSATION = "gen_ai.conversation.id"
INPUT, OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"
SYSTEM, TOOLS = "gen_ai.system_instructions", "gen_ai.tool.definitions"
ANSWER_ID, ANSWER_MODEL = "gen_ai.response.id", "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
JUDGED = "gen_ai.evaluation.result"  # an event's name
# field of a body -> attribute, and its type
REQUEST: Mapping[str, tuple[str, type]] = {
    "model": ("gen_ai.request.model", str),
    "max_completion_tokens": ("gen_ai.request.max_tokens", int),
    "max_tokens": ("gen_ai.request.max_tokens", int),
    "temperature": ("gen_ai.request.temperature", float),
    "top_p": ("gen_ai.request.top_p", float),
    "top_k": ("gen_ai.request.top_k", int),
    "seed": ("gen_ai.request.seed", int),
    "n": ("gen_ai.request.choice.count", int),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", float),
    "presence_penalty": ("gen_ai.request.presence_penalty", float),
}
# attribute -> field of a body: the way back
FIELDS: Mapping[str, str] = {
    **{attribute: name for name, (attribute, _) in REQUEST.items()},
    STOPS: "stop",
}
LEAVES = "client_cancelled"  # an `error.type` that is nobody's failure


def requested(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a request's body says of how to answer."""
    found: dict[str, Any] = {}
    for name, (attribute, kind) in REQUEST.items() if body else ():
        value = body.get(name)
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is kind and attribute not in found:
            found[attribute] = value
    stop = body.get("stop")
    if (stops := stops_of(stop)) or stop == []:
        found[STOPS] = stops
    return found


def stops_of(stop: Any) -> list[str]:
    """A body's `stop`; nothing of what is none."""
    stops = [stop] if isinstance(stop, str) else stop
    return [one for one in stops if isinstance(one, str)] if isinstance(stops, list) else []


def about(
    operation: str, provider: str, model: str, body: Mapping[str, Any], *, stream: bool
) -> dict[str, Any]:
    """One request to one server."""
    return {
        OPERATION: operation,
        PROVIDER: provider,
        "gen_ai.request.model": model,
        STREAM: stream,
        **requested(body),
    }


def asked_of(model: str, request_id: str) -> dict[str, str]:
    """A request as a server knows it, by the names that vLLM gives it."""
    return {"gen_ai.request.model": model, "gen_ai.request.id": request_id}


def responded(answer_id: str, first_chunk_s: float | None) -> dict[str, Any]:
    """Of an answer: what it calls itself, how long its first chunk took; what is known of it."""
    found = {ANSWER_ID: answer_id} if answer_id else {}
    if first_chunk_s is not None:
        return found | {FIRST_CHUNK: round(first_chunk_s, 6)}
    return found


def counted(prompt: Any, answer: Any, cached: Any) -> dict[str, int]:
    """Tokens as a server counts them; what is no count is left out."""
    found = {
        INPUT_TOKENS: prompt,
        OUTPUT_TOKENS: answer,
        "gen_ai.usage.cache_read.input_tokens": cached,
    }
    return {name: value for name, value in found.items() if type(value) is int}


def latencies(
    *, whole_s: float, first_token_s: float, queue_s: float, prefill_s: float, decode_s: float
) -> dict[str, float]:
    """Where an engine's time went, by the names that vLLM gives it."""
    return {
        "gen_ai.latency.e2e": whole_s,
        "gen_ai.latency.time_to_first_token": first_token_s,
        "gen_ai.latency.time_in_queue": queue_s,
        "gen_ai.latency.time_in_model_prefill": prefill_s,
        "gen_ai.latency.time_in_model_decode": decode_s,
        "gen_ai.latency.time_in_model_inference": prefill_s + decode_s,
    }


def evaluated(name: str, score: float) -> dict[str, str | float]:
    """One judgement of an answer, as an event has it."""
    return {"gen_ai.evaluation.name": name, "gen_ai.evaluation.score.value": float(score)}
