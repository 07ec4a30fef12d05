"""A candidate's edge: the baseline's, with what a rollout's orders change.

Knows what may differ, and which keys may go to its replicas.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gateway import problems
from gateway.edge import Edge, build
from gateway.orders import Orders
from gateway.replica import replicas_of
from policies.discovery import Upstream
from policies.schema import Deployment, Gateway

# Known to the listening socket, to the door, or to those who steer: no candidate's to change.
NOT_PATCHED = frozenset(
    ("host", "port", "processes", "store", "tenants", "secret_env", "admin", "drain_s", "reload",
     "max_body_bytes", "body_timeout_s", "max_in_flight")
)  # fmt: skip


def candidate(baseline: Edge, orders: Orders) -> Edge:
    """The baseline's edge with what the candidate changes. Raises Problem 400."""
    policy = patched(baseline.policy, orders.patch)
    if not orders.replicas:
        return build(policy, baseline.pool.replicas, baseline, arm=orders.id)
    servers = tuple(Upstream.model_validate(one) for one in orders.replicas)
    for name in {one.api_key_env for one in servers if one.api_key_env}:
        check_key(baseline.policy, name)  # orders may come by the store, too
    policy = policy.model_copy(update={"upstreams": servers, "discovery": ()})
    replicas = replicas_of(policy, (), os.environ)
    known = (one.tokenizer for one in baseline.pool.replicas if one.tokenizer is not None)
    tokenizer = next(known, None)
    for replica in replicas:
        replica.own = replica.kind == "headgate"  # a worker of ours: it sees no client's key
        replica.tokenizer = replica.tokenizer or tokenizer
    edge = build(policy, replicas, baseline, arm=orders.id)
    edge.pool.rescuers = lambda: baseline.pool.replicas
    return edge


def check_key(policy: Deployment, name: str) -> None:
    """Who steers rollouts may not have any variable of ours sent anywhere: of those that the policy
    means for replicas, one that is set. Raises Problem 400."""
    known = {*policy.gateway.admin.candidate_keys}
    known |= {one.api_key_env or "" for one in policy.upstreams}
    known |= {one.api_key_env or "" for one in policy.discovery}
    if policy.runtime is not None:
        known.add(policy.runtime.key_env or "")
    if name not in known:
        expected = "variables of the policy's replicas or in gateway.admin.candidate_keys"
        raise problems.wrong_value("replicas[].api_key_env", expected, name)
    if not os.environ.get(name, "").strip():
        set_here = "variables that are set where the gateway runs"
        raise problems.wrong_value("replicas[].api_key_env", set_here, name)


def patched(policy: Deployment, patch: Mapping[str, Any]) -> Deployment:
    """The policy with other values at dotted paths below `gateway`. Raises Problem 400."""
    whole = policy.gateway.model_dump()
    for path, value in patch.items():
        head, *names = path.split(".")
        if head != "gateway" or not names or names[0] in NOT_PATCHED:
            raise problems.wrong_value("patch", "fields of `gateway` that may differ", path)
        *within, last = names
        place = whole
        for name in within:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    try:
        gateway = Gateway.model_validate(whole)
    except ValueError as error:
        raise problems.wrong_value(
            "patch", "a valid `gateway`", problems.quote(str(error))
        ) from None
    return policy.model_copy(update={"gateway": gateway})
