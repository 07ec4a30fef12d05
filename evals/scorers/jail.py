"""Run by `sandbox.py` in a process of its own: gives everything up, then runs what stdin says.

    python -I -S jail.py MEMORY_BYTES SECONDS, with a secret and then the program on stdin

Needs nothing but the standard library. The filter is classic BPF over system call numbers, see
seccomp(2); it denies by EPERM, so that programs see an ordinary OSError.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import platform
import resource
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # EPERM is 1
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ARCH_AT, _NUMBER_AT, _ARGUMENTS_AT = 4, 0, 16
_X32 = 0x3FFFFFFF  # numbers above belong to another table of calls
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Of both machines: io_uring, clone3, openat2, pidfd_*, mount API, landlock, fchmodat2.
_NEW = [*range(424, 449), 452, 463, 464, 465, 466]
# machine -> audit architecture, calls that are denied, calls that open files: (number, flags at).
_MACHINES: dict[str, tuple[int, list[int], list[tuple[int, int]]]] = {
    "x86_64": (
        0xC000003E,
        [
            29, 30, 31, *range(41, 60), 62, 64, 65, 66, 67, 68, 69, 70, 71, 76, 77, *range(82, 96),
            101, 132, 133, *range(155, 158), *range(160, 183), *range(188, 191), *range(197, 201),
            206, 207, 208, 209, 210, 234, 235, *range(240, 252), *range(258, 262), 263, 264, 265,
            266, 268, 272, 280, 285, 288, 297, 298, 299, 303, 304, 307, 308, 310, 311, 313, 316,
            320, 321, 322, 323, *_NEW,
        ],
        [(2, 1), (257, 2)],
    ),
    "aarch64": (
        0xC00000B7,
        [
            0, 1, 2, 3, 4, 5, 6, 7, 14, 15, 16, *range(33, 42), 45, 46, 47, *range(51, 56), 88, 89,
            97, 104, 105, 106, 112, 116, 117, 129, 130, 131, 137, 138, 142, *range(160, 164),
            *range(180, 222), 240, 241, 242, 243, 262, 263, 264, 265, 266, 268, 269, 270, 271, 273,
            276, 280, 281, 282, *_NEW,
        ],
        [(56, 2)],
    ),
}  # fmt: skip


def filter_for(machine: str) -> bytes:
    """The program of the filter. Raises KeyError for a machine that it is not written for."""
    arch, denied, opens = _MACHINES[machine]
    steps = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _NUMBER_AT), (_ABOVE, 0, 1, _X32), (_RETURN, 0, 0, _DENY)]
    for number in sorted(set(denied)):
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    for number, at in opens:
        steps += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * at),
            (_ANY_BIT, 0, 1, _WRITES),
            (_RETURN, 0, 0, _DENY),
            (_RETURN, 0, 0, _ALLOW),
        ]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def give_up(memory_bytes: int, seconds: int) -> None:
    """Limits, then the filter. Raises OSError or KeyError where the machine has none."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    program = filter_for(platform.machine())
    held = ctypes.create_string_buffer(program)
    head = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(head), 0, 0),
    ):
        if libc.prctl(*call) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def main() -> None:
    memory_bytes, seconds = int(sys.argv[1]), int(sys.argv[2])
    secret, _, program = sys.stdin.buffer.read().decode().partition("\n")
    told = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    sys.argv[:] = ["answer.py"]
    try:
        give_up(memory_bytes, seconds)
    except (OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"cannot be held in: {error!r}")
        raise SystemExit(1) from None
    names = {"__name__": "answer", "__builtins__": builtins}
    exec(compile(program, "answer.py", "exec"), names)  # noqa: S102  # what this program is for
    os.write(told, secret.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
