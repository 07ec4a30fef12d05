"""Which tier a request is of and what it is promised, and how a replica is told.

Knows the policy's tiers, a tenant's rights, and what a request may say of itself; no load.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from gateway import problems
from gateway.call import Call
from gateway.keys import Known
from policies.schema import Gateway, Tier
from policies.slo import DEFAULT_TIER

TIER_HEADER = "x-headgate-tier"
PRIORITY_HEADER = "x-headgate-priority"
TTFT_HEADER = "x-slo-ttft-ms"
TPOT_HEADER = "x-slo-tpot-ms"
DEADLINE_HEADER = "x-slo-deadline-ms"
TARGETS = (TTFT_HEADER, TPOT_HEADER, DEADLINE_HEADER)
TARGET_MS_MAX = 86_400_000
DEADLINE_GRACE_S = 0.25  # in which a worker says by itself that the deadline is over


@dataclass(slots=True)
class Service:
    """What one request is promised. Milliseconds; None where nothing is."""

    tier: str
    rules: Tier
    ttft_ms: float | None
    tpot_ms: float | None
    deadline_ms: float | None
    asked: bool  # by the request or for its tenant; what nobody asked for, no replica is told

    def limit_s(self, total_s: float | None) -> float | None:
        """When the gateway itself gives up: behind a worker that knows the deadline, or at the time
        that any answer may take."""
        if self.deadline_ms is None:
            return total_s
        own_s = self.deadline_ms / 1000 + DEADLINE_GRACE_S
        return own_s if total_s is None else min(own_s, total_s)


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers of a policy, and the secret that salts are made of."""

    rules: Mapping[str, Tier]
    salt_secret: bytes = field(repr=False)

    @classmethod
    def of(cls, policy: Gateway, salt_secret: bytes) -> Tiers:
        return cls(policy.tiers, salt_secret)

    def tier(self, call: Call, tenant: Known) -> Service:
        """By `x-headgate-tier`, else `service_tier`, else the targets asked for, else the tenant's
        own. A tier that the tenant may not use becomes the next one below it that it may.

        Raises Problem 400 for a tier that does not exist and for a target that is none.
        """
        rights = tenant.rights
        allowed: Sequence[str] = rights.tiers if rights and rights.tiers else tuple(self.rules)
        ttft_ms, tpot_ms, deadline_ms = targets(call.headers)
        named = self._named(call)
        asks = ttft_ms is not None or tpot_ms is not None
        if named is None and asks:
            named = self._loosest(allowed, ttft_ms, tpot_ms)
        asked = named is not None or rights is not None or deadline_ms is not None
        if named is None:
            named = rights.tiers[0] if rights and rights.tiers else DEFAULT_TIER
        if named not in allowed:
            named = self._below(named, allowed)
        rules = self.rules[named]
        # Looser than promised is anybody's wish, tighter nobody's right.
        if asks and rights is not None:
            ttft_ms, tpot_ms = (
                _not_below(ttft_ms, rules.ttft_ms),
                _not_below(tpot_ms, rules.tpot_ms),
            )
        last_ms = None if rules.deadline_s is None else 1000 * rules.deadline_s
        if last_ms is not None:
            deadline_ms = last_ms if deadline_ms is None else min(deadline_ms, last_ms)
        return Service(
            named,
            rules,
            rules.ttft_ms if ttft_ms is None else ttft_ms,
            rules.tpot_ms if tpot_ms is None else tpot_ms,
            deadline_ms,
            asked or last_ms is not None,
        )

    def told(self, call: Call, tenant: Known, service: Service) -> Call:
        """The call as a replica gets it: with what it is promised, and without the tenant's key."""
        rights = tenant.rights
        if rights is None and not service.asked:
            return call
        more: dict[str, str | int] = {}
        if rights is not None and rights.isolate:
            more["cache_salt"] = self.salt(tenant.name, call.data.get("cache_salt"))
        if rights is not None and "priority" in call.data:  # not a tenant's to choose
            more["priority"] = service.rules.priority
        body, data = amended(call, more) if more else (call.body, call.data)
        headers = _headers(call, service, ranked="priority" in call.data and rights is None)
        authorization = call.authorization if rights is None else None
        return Call(call.path, call.model, call.stream, body, headers, authorization, data)

    def salt(self, tenant: str, own: object = None) -> str:
        """The salt of a tenant's prompts; within it, the tenant may keep its own users apart by the
        `cache_salt` that it sends. Nobody without the secret can make another tenant's."""
        name = tenant.encode()
        material = len(name).to_bytes(4, "little") + name
        if own is not None:
            material += orjson.dumps(own)
        return hmac.new(self.salt_secret, material, hashlib.sha256).hexdigest()

    def _named(self, call: Call) -> str | None:
        name = call.headers.get(TIER_HEADER)
        if name is not None:
            if name not in self.rules:
                raise problems.unknown_tier(name, list(self.rules))
            return name
        wish = call.data.get("service_tier")
        if wish is None:
            return None
        for name, rules in self.rules.items():
            if rules.service_tier == wish:
                return name
        return None  # `auto`, and what other servers may know

    def _loosest(self, allowed: Sequence[str], ttft_ms: float | None, tpot_ms: float | None) -> str:
        """The last tier that promises as much as is asked for, else the first of all."""
        ranked = sorted(allowed, key=lambda name: self.rules[name].priority)
        for name in reversed(ranked):
            rules = self.rules[name]
            if _within(rules.ttft_ms, ttft_ms) and _within(rules.tpot_ms, tpot_ms):
                return name
        return ranked[0]

    def _below(self, name: str, allowed: Sequence[str]) -> str:
        """The best of the allowed tiers that is no better than `name`, else the worst of them."""
        wanted = self.rules[name].priority
        ranked = sorted(allowed, key=lambda one: self.rules[one].priority)
        lower = [one for one in ranked if self.rules[one].priority >= wanted]
        return lower[0] if lower else ranked[-1]


def targets(headers: Mapping[str, str]) -> tuple[float | None, float | None, float | None]:
    """TTFT, TPOT and deadline that a request asks for. Raises Problem 400."""
    if headers.keys().isdisjoint(TARGETS):
        return None, None, None
    return (
        _target(headers, TTFT_HEADER),
        _target(headers, TPOT_HEADER),
        _target(headers, DEADLINE_HEADER),
    )


def _target(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= TARGET_MS_MAX:
        expected = f"milliseconds above 0 and at most {TARGET_MS_MAX}"
        raise problems.wrong_value(name, expected, problems.quote(text))
    return value


def _within(promised_ms: float | None, asked_ms: float | None) -> bool:
    return asked_ms is None or (promised_ms is not None and promised_ms <= asked_ms)


def _not_below(asked_ms: float | None, promised_ms: float | None) -> float | None:
    """A wish clamped to what the tier promises; where that is nothing, nothing may be asked."""
    if asked_ms is None or promised_ms is None:
        return promised_ms
    return max(asked_ms, promised_ms)


def _headers(call: Call, service: Service, *, ranked: bool) -> dict[str, str]:
    """What goes on; `ranked`: the request says by itself how urgent it is, and may."""
    if not service.asked:
        return call.headers
    headers = {**call.headers, TIER_HEADER: service.tier}
    if not ranked:
        headers[PRIORITY_HEADER] = str(service.rules.priority)
    for name, target_ms in (
        (TTFT_HEADER, service.ttft_ms),
        (TPOT_HEADER, service.tpot_ms),
        (DEADLINE_HEADER, service.deadline_ms),
    ):
        if target_ms is not None:
            headers[name] = f"{target_ms:.10g}"
        else:
            headers.pop(name, None)
    return headers


def amended(call: Call, fields: Mapping[str, str | int]) -> tuple[bytes, dict[str, object]]:
    """The call's body and data with these fields. Only where one stands already is the body written
    anew, so that no parser can find the old one; else they are the last of the object."""
    data = {**call.data, **fields}
    if not fields.keys().isdisjoint(call.data):
        return orjson.dumps({**orjson.loads(call.body), **fields}), data
    end = call.body.rindex(b"}")
    return call.body[:end] + b"," + orjson.dumps(fields)[1:], data
