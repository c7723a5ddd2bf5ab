"""Landlock, a second layer below the box's mounts: writing in one directory only, no TCP.

See https://docs.kernel.org/userspace-api/landlock.html; the numbers are those of linux/landlock.h.
"""

import ctypes
import os

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls, the same on every architecture."""
VERSION_FLAG, PATH_BENEATH = 1, 1
READ = 0b1101
"""Execute a file, read a file, read a directory."""
ACCESS_BITS = (0, 13, 14, 15, 15, 16)
"""By version: how many kinds of access to files there are (5 adds ioctl on devices)."""
TCP_BITS, SCOPE_BITS = 0b11, 0b11
"""Bind and connect, from version 4; abstract Unix sockets and signals, from version 6."""
PR_SET_NO_NEW_PRIVS = 38


class _Ruleset(ctypes.Structure):
    _fields_ = [
        ("files", ctypes.c_uint64),
        ("net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [
        ("access", ctypes.c_uint64),
        ("parent", ctypes.c_int32),
    ]


def restrict(writable: str) -> int:
    """Let this process and its children read everywhere and write below one directory only.

    Returns the version of Landlock that the kernel has, or 0 if it has none. Raises OSError where
    it has one and refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version: int = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG)
    if version < 1:
        return 0
    everything = 2 ** ACCESS_BITS[min(version, 5)] - 1
    ruleset = _Ruleset(
        everything, TCP_BITS if version >= 4 else 0, SCOPE_BITS if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    fd = _checked(libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0))
    for path, access in (("/", READ), ("/dev/null", READ | 2), (writable, everything)):
        parent = os.open(path, os.O_PATH)
        rule = _PathBeneath(access if os.path.isdir(path) else access & 0b111, parent)
        _checked(libc.syscall(ADD_RULE, fd, PATH_BENEATH, ctypes.byref(rule), 0))
        os.close(parent)
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(RESTRICT_SELF, fd, 0))
    os.close(fd)
    return version


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock refused")
    return result
