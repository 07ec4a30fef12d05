"""`python -m gateway.record_writer SETTINGS`: makes spans of what a gateway hands it, and files.

A process of its own, started by `record.py`: neither JSON, patterns nor a slow disk take time from
the loop that serves. Reads frames from its standard input until that ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from gateway.genai import Exchange, span_of
from gateway.record_files import Files, line_of
from gateway.redact import blotter

log = logging.getLogger("headgate.record")

NICE = 10
LENGTHS = struct.Struct(">III")  # of facts, request and answer, which follow


def frames(stream: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes, bytes]]:
    """Facts, request, answer; half a frame at the end is left out."""
    while len(head := stream.read(LENGTHS.size)) == LENGTHS.size:
        parts = [stream.read(length) for length in LENGTHS.unpack(head)]
        if [len(part) for part in parts] != list(LENGTHS.unpack(head)):
            return
        yield orjson.loads(parts[0]), parts[1], parts[2]


def write(stream: BinaryIO, settings: dict[str, Any]) -> int:
    """Records until the stream ends. 1 where the folder cannot be written."""
    blot = blotter(settings["redact"], settings["patterns"])
    try:
        files = Files(Path(settings["path"]), settings["file_bytes"], settings["max_bytes"])
        salt = files.salt()
        for facts, request, answer in frames(stream):
            session = facts.pop("session")
            name = blake2b(session.encode(), key=salt, digest_size=16).hexdigest()
            exchange = Exchange(trace_id=name, **facts)
            try:
                span = span_of(exchange, request, answer, blot, content=settings["content"])
                line = line_of(name, orjson.dumps(span))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                log.warning("request %s could not be recorded: %s", facts["span_id"], error)
                continue
            files.write(line)
        files.close()
    except OSError as error:
        print(f"recording ended: {settings['path']}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


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
