"""Every error of the gateway that a client can see, in the order of a request's life.

Each is one function that returns a `wire.Problem`: what happened, where, and the next step. Errors
that a replica answers are relayed as they came and do not stand here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from runtime.wire import Problem

RETRY_AFTER_MAX_S = 86_400.0
NAMED_MAX = 20  # models or replicas named in one message
QUOTED_CHARS = 200  # of anything that a client or a replica sent
# Codes of those below that a replica caused: its circuit counts them.
REPLICA_FAILED = frozenset(
    (
        "upstream_cut", "upstream_encoding", "upstream_failed", "upstream_idle_timeout",
        "upstream_not_streaming", "upstream_stream_cut", "upstream_timeout",
    )
)  # fmt: skip


def quote(text: str) -> str:
    """Foreign text for a message: bounded, with control characters escaped."""
    return repr(text if len(text) <= QUOTED_CHARS else text[:QUOTED_CHARS] + "...")


def listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return f"{shown} and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else shown


# ---- the connection -----------------------------------------------------------------------------


def malformed_http() -> Problem:
    return Problem(400, "what came is not an HTTP/1.1 request", code="invalid_http")


def headers_too_slow(timeout_s: float) -> Problem:
    message = (
        f"the request's headers did not arrive within {timeout_s:g} s; send them again at once"
    )
    return Problem(408, message, code="request_timeout")


def headers_too_large(limit_bytes: int) -> Problem:
    message = (
        f"the request's headers are larger than {limit_bytes} bytes; send fewer or shorter ones"
    )
    return Problem(431, message, code="headers_too_large")


# ---- the door -----------------------------------------------------------------------------------


def host_not_allowed(host: str) -> Problem:
    message = (
        f"the Host {quote(host)} is not this machine; ask for localhost, 127.0.0.1 or [::1] "
        "(without keys, other names are refused, because a web page could use one)"
    )
    return Problem(403, message, code="host_not_allowed")


def origin_not_allowed(origin: str) -> Problem:
    message = (
        f"the Origin {quote(origin)} is not this machine; without keys, only pages from localhost "
        "may ask, and programs that send no Origin"
    )
    return Problem(403, message, code="origin_not_allowed")


def page_not_ours(origin: str) -> Problem:
    message = (
        f"a page of the Origin {quote(origin)} may not steer this gateway; without keys, only its "
        "own console may, and programs that send no Origin"
    )
    return Problem(403, message, code="origin_not_allowed")


def key_missing() -> Problem:
    message = (
        "no API key came with the request; send `Authorization: Bearer ...` with the key that "
        "this gateway's operator gave you"
    )
    return Problem(401, message, code="missing_api_key", headers={"www-authenticate": "Bearer"})


def key_wrong() -> Problem:
    message = "the API key is not known here; check it, or ask this gateway's operator for one"
    return Problem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def key_not_operators() -> Problem:
    message = (
        "the API key does not open this; it takes the operator's key (gateway.admin.key_env of the "
        "policy names its variable)"
    )
    return Problem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


# ---- the route ----------------------------------------------------------------------------------


def trace_not_found(name: str, kept: int, where: str) -> Problem:
    message = (
        f"there is no trace {quote(name)}; {where} keeps its latest {kept}, and of those that "
        "failed or were late some older ones (tracing.keep), by trace, request, receipt and answer "
        "id"
    )
    return Problem(404, message, code="trace_not_found")


def receipt_not_found(name: str, kept: int, where: str) -> Problem:
    message = (
        f"there is no receipt {quote(name)}; {where} keeps its latest {kept} "
        "(gateway.routing.receipts), by receipt, request, trace and answer id"
    )
    return Problem(404, message, code="receipt_not_found")


def unknown_path(path: str) -> Problem:
    message = (
        f"nothing is served at {quote(path)}; there are /v1/chat/completions, /v1/completions, "
        "/v1/models, /health, /metrics and /console"
    )
    return Problem(404, message, code="unknown_url")


def wrong_method(method: str, path: str, allowed: str) -> Problem:
    message = f"{quote(method)} is not allowed at {quote(path)}; use {allowed}"
    return Problem(405, message, code="method_not_allowed", headers={"allow": allowed})


# ---- rollouts -----------------------------------------------------------------------------------


def admin_off() -> Problem:
    message = (
        "rollouts cannot be steered here: this gateway has tenants, and no `gateway.admin.key_env`"
    )
    return Problem(403, message, code="admin_off")


def no_rollout(name: str) -> Problem:
    message = f"there is no rollout {quote(name)}; GET /admin/variants tells which one runs"
    return Problem(404, message, code="rollout_not_found")


def no_such_replica(url: str, known: Sequence[str]) -> Problem:
    message = f"there is no replica {quote(url)}; there are {listing(known) or 'none'}"
    return Problem(404, message, param="url", code="replica_not_found")


def rollout_runs(name: str) -> Problem:
    message = f"the rollout {quote(name)} is running; end it first: one candidate at a time"
    return Problem(409, message, code="rollout_runs")


def rollout_ended(name: str, why: str) -> Problem:
    message = f"the rollout {quote(name)} was rolled back: {why}; it needs new evidence"
    return Problem(409, message, code="rollout_ended")


def no_live_pass(ledgers: Sequence[str]) -> Problem:
    message = (
        "no live pass speaks for exactly this baseline, candidate and hypothesis in "
        f"{listing(ledgers)}; run the gate, or name its ledger in `gate.ledger`"
    )
    return Problem(403, message, code="no_live_pass")


def gate_not_passed(result: Mapping[str, object]) -> Problem:
    message = f"the gate says {result['result']} of {result['fingerprint']}: {result['reason']}"
    return Problem(403, message, code="gate_not_passed")


def ledger_unreadable(why: str) -> Problem:
    return Problem(503, why, code="ledger_unreadable", headers={"retry-after": "1"})


def rollout_needs_store() -> Problem:
    message = (
        "several gateway processes can only roll out together: give `gateway.store`, or set "
        "`gateway.processes` to 1"
    )
    return Problem(409, message, code="rollout_needs_store")


def store_away() -> Problem:
    message = "the shared store is away, so that other gateways would not hear of it; try again"
    return Problem(503, message, code="store_away", headers={"retry-after": "1"})


def candidate_not_ready(states: Sequence[str]) -> Problem:
    message = f"no replica of the candidate takes requests: {listing(states) or 'it has none'}"
    return Problem(503, message, code="candidate_not_ready", headers={"retry-after": "2"})


# ---- the place ----------------------------------------------------------------------------------


def overloaded(limit: int) -> Problem:
    message = f"{limit} requests are running, which is this gateway's limit; try again in a second"
    return Problem(503, message, code="overloaded", headers={"retry-after": "1"})


def draining() -> Problem:
    message = "this gateway is shutting down and takes no new requests; try again in a few seconds"
    return Problem(503, message, code="draining", headers={"retry-after": "5"})


def stopped() -> Problem:
    message = "this gateway stopped before the answer was complete; send the request again"
    return Problem(503, message, code="gateway_stopped", headers={"retry-after": "5"})


# ---- the body -----------------------------------------------------------------------------------


def body_encoded(encoding: str) -> Problem:
    message = f"content-encoding {quote(encoding)} is not accepted; send the body unencoded"
    return Problem(415, message, code="unsupported_content_encoding")


def upgrade_offered(protocol: str) -> Problem:
    """The parser reads no body behind such an offer (Java's HttpClient makes one by default)."""
    message = (
        f"an upgrade to {quote(protocol)} is not supported; set the client to HTTP/1.1, so that it "
        "sends no Upgrade header"
    )
    return Problem(400, message, code="upgrade_not_supported", headers={"connection": "close"})


def body_too_large(limit_bytes: int) -> Problem:
    message = (
        f"the body is larger than {limit_bytes} bytes; send less, or raise gateway.max_body_bytes "
        "in the policy"
    )
    return Problem(413, message, code="body_too_large")


def body_too_slow(timeout_s: float) -> Problem:
    message = f"the body did not arrive within {timeout_s:g} s; send it again at once"
    return Problem(408, message, code="request_timeout", headers={"connection": "close"})


def missing(field: str, expected: str) -> Problem:
    message = f"{field} is missing; expected {expected}"
    return Problem(400, message, param=field, code="missing_required_parameter")


def wrong_value(field: str, expected: str, got: str) -> Problem:
    message = f"{field}: expected {expected}, got {got}"
    return Problem(400, message, param=field, code="invalid_value")


def unknown_query(name: str, known: Sequence[str]) -> Problem:
    message = f"nothing is asked by {quote(name)} here; expected {listing(known)}"
    return Problem(400, message, param=name[:64], code="unknown_parameter")


def unknown_tier(name: str, tiers: Sequence[str]) -> Problem:
    message = (
        f"there is no tier {quote(name)}; expected one of {listing(tiers)}, which are the policy's "
        "gateway.tiers"
    )
    return Problem(400, message, param="x-headgate-tier", code="unknown_tier")


def prompt_beyond_tier(tokens: int, tier: str, limit: int) -> Problem:
    message = (
        f"the prompt has about {tokens} tokens, and the tier {tier!r} takes {limit}; shorten it, "
        "or ask for another tier by x-headgate-tier"
    )
    return Problem(400, message, code="context_length_exceeded")


# ---- limits and queue ---------------------------------------------------------------------------


def _after(seconds: float) -> str:
    return str(max(1, math.ceil(min(seconds, RETRY_AFTER_MAX_S))))


def limit_reached(
    what: str, limit: float, wait_s: float, headers: Mapping[str, str], among: int
) -> Problem:
    """429; `what` is requests, tokens or budget. A wait without an end is a request too large. Of
    several gateways that cannot ask each other, `limit` is one's share."""
    told = f"{limit:.0f}" if limit >= 100 else f"{limit:.3g}"  # shares may be less than whole
    named = {
        "requests": f"{told} requests per minute",
        "tokens": f"{told} tokens per minute",
        "budget": f"{told} tokens per day",
    }[what]
    if among > 1:
        named += f" (the share of one of {among} gateway processes without a common store)"
    after = _after(wait_s)
    message = f"this tenant's limit of {named} is reached; try again in {after} s"
    if math.isinf(wait_s):
        message = f"this request alone is more than this tenant's limit of {named}; ask for less"
    code = "insufficient_quota" if what == "budget" else "rate_limit_exceeded"
    kind = "insufficient_quota" if what == "budget" else what
    return Problem(429, message, code=code, kind=kind, headers={**headers, "retry-after": after})


def limits_unknown() -> Problem:
    """The policy closes limits while the shared store is away."""
    message = (
        "this tenant's limits are kept in a store that does not answer now, and the policy lets "
        "nobody through without it; try again in a second"
    )
    return Problem(503, message, code="limits_unknown", headers={"retry-after": "1"})


def saturated(tier: str, wait_s: float) -> Problem:
    after = _after(wait_s)
    message = (
        f"more is asked of the replicas than they can do, and a request of the tier {tier!r} would "
        f"wait too long; try again in {after} s"
    )
    return Problem(503, message, code="overloaded", headers={"retry-after": after})


def too_late(tier: str, waited_s: float) -> Problem:
    message = (
        f"this request of the tier {tier!r} waited {waited_s:.1f} s for a replica, and would be "
        "later than its deadline; it was not sent to one"
    )
    return Problem(504, message, code="deadline_exceeded")


# ---- the replica --------------------------------------------------------------------------------


def model_not_found(model: str, served: Sequence[str], down: Sequence[str]) -> Problem:
    message = (
        f"the model {quote(model)} does not exist here; available: {listing(served) or 'none'}"
    )
    if down:
        message += f" (replicas that are down may serve others: {listing(down)})"
    return Problem(404, message, param="model", code="model_not_found")


def loading(states: Sequence[str]) -> Problem:
    message = f"the model is still loading; try again in a second ({listing(states)})"
    return Problem(503, message, code="no_replica", headers={"retry-after": "1"})


def no_replica(model: str, states: Sequence[str], after_s: float = 1.0) -> Problem:
    after = max(1, math.ceil(after_s))
    message = (
        f"no replica can take a request for {quote(model)} now; try again in {after} s "
        f"({listing(states)})"
    )
    return Problem(503, message, code="no_replica", headers={"retry-after": str(after)})


def upstream_failed(url: str, reason: str) -> Problem:
    message = f"the replica {url} failed before it answered: {reason}; send the request again"
    return Problem(502, message, code="upstream_failed")


def upstream_timeout(timeout_s: float) -> Problem:
    message = (
        f"the replica sent nothing within {timeout_s:g} s; send the request again, or raise "
        "gateway.first_byte_timeout_s in the policy"
    )
    return Problem(504, message, code="upstream_timeout")


def request_timeout(timeout_s: float, deadline_ms: float | None) -> Problem:
    """504; `deadline_ms`: what was asked for or is its tier's, which may not be what has ended."""
    if deadline_ms is not None and timeout_s >= deadline_ms / 1000:
        message = (
            f"the answer was not complete by its deadline of {deadline_ms / 1000:g} s; ask for "
            "less, or for a later one (x-slo-deadline-ms, as far as deadline_s of its tier allows)"
        )
    else:
        message = (
            f"the answer was not complete within {timeout_s:g} s; ask for less, or raise "
            "gateway.total_timeout_s in the policy"
        )
    return Problem(504, message, code="request_timeout")


# ---- the answer ---------------------------------------------------------------------------------


def idle_timeout(timeout_s: float) -> Problem:
    message = (
        f"the replica fell silent for {timeout_s:g} s inside its answer; what came so far is "
        "incomplete"
    )
    return Problem(504, message, code="upstream_idle_timeout")


def stream_cut(reason: str) -> Problem:
    message = f"the replica's stream was cut ({reason}); what came so far is incomplete"
    return Problem(502, message, code="upstream_stream_cut")


def answer_cut(reason: str) -> Problem:
    message = f"the replica's answer was cut ({reason}); send the request again"
    return Problem(502, message, code="upstream_cut")


def answer_too_large(limit_bytes: int) -> Problem:
    message = f"the replica's answer is larger than {limit_bytes} bytes; use stream: true"
    return Problem(502, message, code="upstream_too_large")


def answer_encoded(encoding: str) -> Problem:
    message = (
        f"the replica encoded its stream as {quote(encoding)} though identity was asked for; "
        "turn its compression off"
    )
    return Problem(502, message, code="upstream_encoding")


def not_a_stream(content_type: str) -> Problem:
    message = f"the replica answered {quote(content_type)} where a stream was asked for"
    return Problem(502, message, code="upstream_not_streaming")


def late_error(status: int, text: str) -> Problem:
    """For an error answer that is not in OpenAI's shape and comes when the stream has begun."""
    return Problem(status, f"the replica answered {status}: {quote(text)}", code="upstream_error")


def internal() -> Problem:
    message = "the gateway failed on this request; its log says why under the request's id"
    return Problem(500, message, code="internal_error")
