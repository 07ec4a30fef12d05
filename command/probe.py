"""`python -m command.probe URL`: whether a server says that it is well. The health check of images,
which have neither curl nor a shell to rely on."""

from __future__ import annotations

import http.client
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

TIMEOUT_S = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 for an answer of 200, 1 for any other and for none, with the reason on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parts = urlsplit(arguments[0] if len(arguments) == 1 else "")
    if parts.scheme != "http" or parts.hostname is None:
        print("give one URL: python -m command.probe http://127.0.0.1:8080/health", file=sys.stderr)
        return 1
    line = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        line.request("GET", parts.path or "/")
        status = line.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 1
    finally:
        line.close()
    if status != 200:
        print(f"{arguments[0]}: {status}", file=sys.stderr)
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
