"""How many files a program of ours may have open: a connection is one, too. Knows no program."""

from __future__ import annotations

import resource
from contextlib import suppress

FILES_MAX = 65_536


def take_files() -> None:
    """As many open files as we may have: the usual 1024 are soon gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft < most:
        with suppress(ValueError):  # macOS has a limit below the one that it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
