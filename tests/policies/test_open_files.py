"""How many streams a process can hold."""

from __future__ import annotations

import resource
import subprocess
import sys

AS_A_SHELL_HAS_THEM = 256
SCRIPT = f"""
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, ({AS_A_SHELL_HAS_THEM}, hard))
from policies.open_files import take_files
take_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_a_process_takes_the_open_files_that_it_may_have() -> None:
    """A stream is two, and the 1024 that a shell or a container begins with are 500 streams: the
    next client was not accepted."""
    _, before = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    soft, hard = map(int, done.stdout.split())
    assert hard == before, "what an administrator has set stays"
    assert soft > AS_A_SHELL_HAS_THEM or hard == AS_A_SHELL_HAS_THEM
