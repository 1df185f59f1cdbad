"""A command without some system calls: `python -m tests.support.seccomp NUMBER,NUMBER… COMMAND…`, as a container's
seccomp profile or an older kernel would have it (ENOSYS)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h


def forbid(numbers: list[int]) -> None:
    """From now on these calls of this process and its children answer ENOSYS (seccomp(2))."""
    program = [struct.pack("=HBBI", _LOAD, 0, 0, 0)]
    for number in numbers:
        program.append(struct.pack("=HBBI", _EQUAL, 0, 1, number))
        program.append(struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    program.append(struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, head, 0, 0) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    forbid([int(number) for number in sys.argv[1].split(",")])
    os.execvp(sys.argv[2], sys.argv[2:])
