"""A request's trail as OpenTelemetry spans. Pure: the same trail gives the same spans.

    SERVER   POST /v1/chat/completions   from the request's first byte to the answer's last
      INTERNAL gateway.upload, gateway.recv_queue, gateway.trim, gateway.prompt, gateway.admit,
               gateway.route, gateway.download
      CLIENT   chat MODEL                each request to a replica; its spans join there
      CLIENT   chat MODEL                a shadow's, `headgate.arm` says so; it may outlive the root

What GenAI's conventions have a name for, telemetry/genai.py names; ours is `headgate.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from gateway.call import CHAT_PATH
from gateway.phases import spent
from gateway.tallies import PHASES
from gateway.trail import Hop, Interval, Trail, is_refusal
from telemetry.genai import CHAT, LEAVES, TEXT, about, counted, responded
from telemetry.trace import Context, Event, Kind, Span, Status

SERVICE = "headgate-gateway"
_PHASES = tuple(f"headgate.phase.{name}_s" for name in PHASES)
WAIT_S = 0.001  # for the client, in the socket's queue; shorter ones are a phase, and no span
CUT = "upstream_stream_cut"  # as gateway/problems.py has it
WELL = frozenset(("200", "left"))  # outcomes of an attempt that are no failure of its replica


def spans_of(trail: Trail) -> list[Span]:
    """The root first."""
    root = _span(trail, f"POST {trail.path}", "SERVER", trail.began, trail.ended, _facts(trail))
    root.span_id, root.parent_id = trail.span_id, trail.parent_id
    if trail.failed:
        root.status = "ERROR"
    if trail.stream and trail.spoke is not None:
        root.events.append(Event("first_token", trail.at_s(trail.spoke)))
    inside = list(_inside(trail))
    for number, one in enumerate(inside, start=1):
        one.span_id = f"{(int(trail.span_id, 16) + number) % 2**64:016x}"
    return [root, *inside, *(_client(trail, hop) for hop in trail.hops)]


def shadow_spans(trail: Trail) -> list[Span]:
    """What a candidate was asked beside the request, once it has answered. A span that outlives the
    root is linked to it as well: not all that shows traces stretches a parent."""
    shadow = trail.shadow
    if shadow is None or not shadow.ended:
        return []
    spans = [_client(shadow, hop) for hop in shadow.hops]
    for one in spans:
        if one.end_s > trail.at_s(trail.ended):
            one.links.append(Context(trail.trace_id, trail.span_id, trail.flags))
    return spans


def _inside(trail: Trail) -> Iterator[Span]:
    """The gateway's own work."""
    told: dict[str, Any]
    for name, began, ended in (
        ("gateway.upload", trail.began, trail.due), ("gateway.recv_queue", trail.due, trail.read),
        ("gateway.download", trail.download.began, trail.download.ended),
    ):  # fmt: skip
        if ended - began >= WAIT_S:
            yield _part(trail, name, Interval(began, ended), {})
    if trail.trim.ended and trail.trimmed is not None:
        trimmed = trail.trimmed
        told = {
            "headgate.trim.removed_tokens": trimmed.removed_tokens,
            "headgate.trim.again_tokens": trimmed.again_tokens,
            "headgate.trim.moved": trimmed.moved,
        }
        yield _part(trail, "gateway.trim", trail.trim, told)
    if trail.prompt.ended:
        receipt = trail.receipt
        told = {"headgate.prompt_tokens": receipt.prompt_tokens} if receipt else {}
        yield _part(trail, "gateway.prompt", trail.prompt, told)
    if trail.admit.ended:
        end = max(trail.admit.ended, trail.queue.ended)
        tier = trail.service.tier if trail.service else ""
        told = {"headgate.slo.tier": tier, "headgate.queue_s": round(trail.queue.s, 6)}
        yield _part(trail, "gateway.admit", Interval(trail.admit.began, end), told)
    if trail.way:
        hop = trail.way[0]
        began = max(trail.admit.ended, trail.queue.ended) or hop.began
        yield _part(trail, "gateway.route", Interval(began, hop.began), _routed(hop))


def _routed(hop: Hop) -> dict[str, Any]:
    options, ask, choice = hop.decision.options, hop.decision.ask, hop.decision.choice
    chosen, terms = options[choice.at], choice.terms[choice.at]
    return {
        "headgate.route.policy": ask.policy,
        "headgate.route.candidates": [one.url for one in options],
        "headgate.route.chosen": chosen.url,
        "headgate.route.cached_tokens": chosen.cached_tokens,
        "headgate.route.same_session": ask.hint == chosen.url,
        "headgate.route.wait_s": round(terms.wait_s, 6),
        "headgate.route.compute_s": round(terms.compute_s, 6),
        "headgate.route.cost_s": round(terms.cost_s, 6),
    }


def _client(trail: Trail, hop: Hop) -> Span:
    """One request to one replica."""
    operation = CHAT if trail.path == CHAT_PATH else TEXT
    host, port = _address(hop.replica.url)
    told: dict[str, Any] = {
        **about(operation, hop.replica.kind, trail.model, trail.asked, stream=trail.stream),
        "server.address": host,
        "server.port": port,
        "headgate.replica": hop.replica.url,
        "headgate.attempt": trail.hops.index(hop) + 1,
        "headgate.outcome": hop.outcome,
    }
    if trail.arm == "shadow":
        told["headgate.arm"] = trail.arm
    if hop.replica.fingerprint:
        told["headgate.config.fingerprint"] = hop.replica.fingerprint
    status: Status = "UNSET"
    if why := _failure(trail, hop):
        told["error.type"] = why
        status = "UNSET" if why == LEAVES or is_refusal(why) else "ERROR"
    first_s = hop.first - hop.began if hop.first is not None and trail.stream else None
    is_last = hop is trail.hops[-1]
    told |= responded(trail.answer_id if is_last else "", first_s)
    if is_last and (usage := trail.usage) is not None:
        told |= counted(usage.prompt_tokens, usage.answer_tokens, usage.cached_tokens)
    ended = trail.ended if hop.ended is None else min(hop.ended, trail.ended)
    span = _span(trail, f"{operation} {trail.model}", "CLIENT", hop.began, ended, told)
    span.span_id, span.status = hop.span_id, status
    if hop.first is not None:
        span.events.append(Event("first_chunk", trail.at_s(hop.first)))
    return span


@lru_cache(256)
def _address(url: str) -> tuple[str, int]:
    where = urlsplit(url)
    return where.hostname or "", where.port or (443 if where.scheme == "https" else 80)


def _failure(trail: Trail, hop: Hop) -> str:
    """Why an attempt has given the client no whole answer; "" for one that has, or went on."""
    ended_by = trail.error if hop is trail.hops[-1] else ""
    if hop.outcome not in WELL:
        return hop.outcome
    if hop.broke:  # another one has gone on with it, where the request did not fail by it
        return ended_by or CUT
    if hop.first is None:
        return ended_by or LEAVES
    return LEAVES if ended_by == LEAVES else ""


def _facts(trail: Trail) -> dict[str, Any]:
    """Of the request as a whole."""
    service, receipt = trail.service, trail.receipt
    found: dict[str, Any] = {
        "http.request.method": "POST",
        "url.path": trail.path,
        "http.response.status_code": trail.status or None,
        "error.type": trail.error or None,
        "headgate.request.id": trail.request_id,
        "headgate.receipt": receipt.id if receipt else None,
        "headgate.tenant": trail.tenant or None,
        "headgate.arm": trail.arm or None,
        "headgate.keep": trail.keep or None,
    }
    if service is not None:
        found["headgate.slo.tier"] = service.tier
        for name, target_ms, took_s in (
            ("ttft", service.ttft_ms, trail.ttft_s), ("tpot", service.tpot_ms, trail.tpot_s),
        ):  # fmt: skip
            if target_ms is not None and took_s is not None:
                found[f"headgate.slo.{name}_met"] = took_s <= target_ms / 1000
    for name, s in zip(_PHASES, spent(trail), strict=True):
        found[name] = round(s, 6)
    return {name: value for name, value in found.items() if value is not None}


def _part(trail: Trail, name: str, when: Interval, told: Mapping[str, Any]) -> Span:
    return _span(trail, name, "INTERNAL", when.began, when.ended, told)


def _span(
    trail: Trail, name: str, kind: Kind, began: float, ended: float, told: Mapping[str, Any]
) -> Span:
    return Span(
        trail.trace_id,
        "",
        trail.span_id,
        name,
        SERVICE,
        kind,
        trail.at_s(began),
        trail.at_s(max(began, ended)),
        attributes=told,
        flags=trail.flags,
        tracestate=trail.tracestate,
    )
