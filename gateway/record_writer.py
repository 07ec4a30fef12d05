"""`python -m gateway.record_writer SETTINGS`: makes spans of what a gateway hands it, and files.

A process of its own, started by `record.py`: neither JSON, patterns nor a slow disk take time from
the loop that serves. Reads frames from its standard input until that ends.
"""

from __future__ import annotations

import json
import logging
import marshal
import os
import secrets
import signal
import struct
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from gateway.genai import Exchange, span_of
from gateway.record_files import Files, line_of
from gateway.record_sample import session_of
from gateway.redact import blotter

log = logging.getLogger("headgate.record")

MODULE = "gateway.record_writer"
NICE = 10
LENGTH = struct.Struct(">I")  # of the frame that follows: entries of one gateway, as plain tuples
MARSHAL_VERSION = 2  # without references: nothing comes twice that is worth finding


class Entry(NamedTuple):
    """A request as the gateway hands it over; its body is JSON, for it has been parsed there."""

    named: str | None  # what it belongs to, as a header says
    request_id: str
    tenant: str
    tier: str
    began: float  # seconds since 1970
    took_s: float
    ttft_s: float | None
    status: int
    error: str
    receipt: str
    prompt_tokens: int | None
    arm: str  # of a rollout; empty where none runs
    trace: str  # its trace's id, where it has one
    request: bytes
    answer: bytes


def entries(stream: BinaryIO) -> Iterator[Entry]:
    """Until the stream ends; half a frame at the end is left out."""
    while len(head := stream.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(head)
        if len(frame := stream.read(length)) < length:
            return
        yield from (Entry(*fields) for fields in marshal.loads(frame))  # noqa: S302  # our parent's


def write(stream: BinaryIO, settings: dict[str, Any]) -> int:
    """Records until the stream ends. 1 where the folder cannot be written."""
    blot = blotter(settings["redact"], settings["patterns"])
    try:
        files = Files(Path(settings["path"]), settings["file_bytes"], settings["max_bytes"])
        salt = files.salt()
        for entry in entries(stream):
            try:
                body = orjson.loads(entry.request)
                exchange = _exchange(entry, body, salt, settings["consent"])
                span = span_of(exchange, body, entry.answer, blot, content=settings["content"])
                line = line_of(exchange.trace_id, orjson.dumps(span))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                log.warning("request %s could not be recorded: %s", entry.request_id, error)
                continue
            files.write(line)
        files.close()
    except OSError as error:
        print(f"recording ended: {settings['path']}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _exchange(entry: Entry, body: dict[str, Any], salt: bytes, consent: str) -> Exchange:
    span_id = secrets.token_hex(8)
    session = session_of(entry.named, body, entry.tenant)
    name = blake2b((session or span_id).encode("utf-8", "replace"), key=salt, digest_size=16)
    return Exchange(
        trace_id=name.hexdigest(),
        span_id=span_id,
        request_id=entry.request_id,
        tenant=entry.tenant,
        tier=entry.tier,
        began=entry.began,
        ended=entry.began + entry.took_s,
        status=entry.status,
        error=entry.error,
        ttft_s=entry.ttft_s,
        conversation=bool(session),
        consent=consent,
        receipt=entry.receipt,
        prompt_tokens=entry.prompt_tokens,
        arm=entry.arm,
        trace=entry.trace,
    )


def yield_to_others() -> None:
    """Whoever serves goes first, and at once: what is only nice keeps a core for milliseconds."""
    os.nice(NICE)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(arguments: list[str]) -> int:
    yield_to_others()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which ends us
    return write(sys.stdin.buffer, json.loads(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
