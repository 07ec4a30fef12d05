"""Spans as OTLP's protobuf (opentelemetry-proto 1.x, trace/v1), a few bytes at a time. Pure.

Written out because the generated classes take more than twice as long for a trace, and are a
package to install; the tests decode by them. Numbers of fields stand in the tags:
`field << 3 | wire type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any

from telemetry.trace import EVENTS_MAX, Context, Event, Kind, Span

KINDS = {"INTERNAL": b"\x30\x01", "SERVER": b"\x30\x02", "CLIENT": b"\x30\x03"}
ERROR = b"\x18\x02"
SCOPE = b"\x0a\x0a\x0a\x08headgate"
_fixed = Struct("<2s16s2s8ssQsQ2sI").pack  # both ids, both moments, the flags
_u64 = Struct("<Q").pack
_u32 = Struct("<I").pack
_f64 = Struct("<d").pack
REPEATED_CHARS = 64  # of a value that is worth remembering
_REPEATED = frozenset((str, bool, int))
_SMALL = [bytes((n,)) for n in range(128)]

Written = list[tuple[str, bytes]]  # spans by the services that they are of


def written(spans: Sequence[Span]) -> Written:
    """Ready for a request."""
    return [(one.service, _part(b"\x12", span(one))) for one in spans]


def request(traces: Sequence[Written], resource: Mapping[str, Any]) -> bytes:
    """The body of an export; spans by service, each with its resource."""
    groups: dict[str, list[bytes]] = {}
    for trace in traces:
        for service, one in trace:
            groups.setdefault(service, []).append(one)
    parts = []
    for service, of_it in groups.items():
        named = attributes(b"\x0a", {"service.name": service, **resource})
        scope = SCOPE + b"".join(of_it)
        parts.append(_part(b"\x0a", _part(b"\x0a", named) + _part(b"\x12", scope)))
    return b"".join(parts)


def span(one: Span) -> bytes:
    parts = [
        _fixed(
            b"\x0a\x10", bytes.fromhex(one.trace_id), b"\x12\x08", bytes.fromhex(one.span_id),
            b"\x39", round(one.start_s * 1e9), b"\x41", round(one.end_s * 1e9),
            b"\x85\x01", one.flags & 0xFF,
        ),
        _titled(one.name, one.kind),
        attributes(b"\x4a", one.attributes),
    ]  # fmt: skip
    if one.parent_id:
        parts += (b"\x22\x08", bytes.fromhex(one.parent_id))
    if one.tracestate:
        parts.append(_part(b"\x1a", one.tracestate.encode()))
    if one.events:
        parts += [_part(b"\x5a", _event(event)) for event in one.events[:EVENTS_MAX]]
        if len(one.events) > EVENTS_MAX:
            parts.append(b"\x60" + _varint(len(one.events) - EVENTS_MAX))
    if one.links:
        parts += [_part(b"\x6a", _link(link)) for link in one.links]
    if one.status != "UNSET" or one.message:
        code = ERROR if one.status == "ERROR" else b"\x18\x01" if one.status == "OK" else b""
        parts.append(_part(b"\x7a", _part(b"\x12", one.message.encode()) + code))
    return b"".join(parts)


@lru_cache(1024)
def _titled(name: str, kind: Kind) -> bytes:
    return _part(b"\x2a", name.encode()) + KINDS[kind]


def _event(event: Event) -> bytes:
    at, name = b"\x09" + _u64(round(event.at_s * 1e9)), _part(b"\x12", event.name.encode())
    return at + name + attributes(b"\x1a", event.attributes)


def _link(link: Context) -> bytes:
    ids = b"\x0a\x10" + bytes.fromhex(link.trace_id) + b"\x12\x08" + bytes.fromhex(link.span_id)
    return ids + b"\x35" + _u32(link.flags & 0xFF)


def attributes(tag: bytes, given: Mapping[str, Any]) -> bytes:
    """Pairs of a name and a value, each behind the tag of the field that they stand in."""
    parts: list[bytes] = []
    for name, one in given.items():
        kind = type(one)
        if kind is float:
            parts += (_before_float(tag, name), _f64(one))
        elif kind in _REPEATED and (kind is not str or len(one) <= REPEATED_CHARS):
            parts.append(_known_pair(tag, name, one))
        else:
            parts.append(_pair(tag, name, one))
    return b"".join(parts)


def _pair(tag: bytes, name: str, one: Any) -> bytes:
    return _part(tag, _part(b"\x0a", name.encode()) + _part(b"\x12", _value(one)))


# Most of what a span says, the one before said, too. 1 and True are equal, and not the same.
_known_pair = lru_cache(2048, typed=True)(_pair)


@lru_cache(1024)
def _before_float(tag: bytes, name: str) -> bytes:
    """All but its eight bytes."""
    return _pair(tag, name, 0.0)[:-8]


def _value(given: Any) -> bytes:
    kind = type(given)
    if kind is str:
        return _part(b"\x0a", given.encode("utf-8", "replace"))
    if kind is bool:
        return b"\x10\x01" if given else b"\x10\x00"
    if kind is int:
        return b"\x18" + _varint(given)
    if kind is float:
        return b"\x21" + _f64(given)
    if kind in (list, tuple):
        return _part(b"\x2a", b"".join([_part(b"\x0a", _value(one)) for one in given]))
    return _part(b"\x0a", str(given).encode("utf-8", "replace"))


def _part(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; negative ones as 64 bits."""
    if 0 <= number < 128:
        return _SMALL[number]
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
