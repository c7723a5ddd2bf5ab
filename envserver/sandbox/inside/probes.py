"""Attempts to get out of a box, from inside. Each returns what it reached; nothing means it held.

selftest.py runs them in a box at the server's start, before anybody else's code has run in one.
"""

import contextlib
import ctypes
import os
import platform
import signal
import socket
import stat
from collections.abc import Callable, Iterable
from functools import partial

_CALLS = {
    # name: (number on x86_64, number on aarch64, arguments)
    "unshare user": (272, 97, (0x10000000,)),
    "unshare mount": (272, 97, (0x20000,)),
    "unshare net": (272, 97, (0x40000000,)),
    "setns": (308, 268, (0, 0)),
    "mount": (165, 40, (b"none", b"/box", b"tmpfs", 0, 0)),
    "mount proc": (165, 40, (b"proc", b"/box", b"proc", 0, 0)),
    "umount": (166, 39, (b"/box", 2)),
    "remount writable": (165, 40, (b"none", b"/usr/lib", 0, 0x1020, 0)),
    "fsopen": (430, 430, (b"tmpfs", 0)),
    "open_tree": (428, 428, (-100, b"/", 1)),
    "pivot_root": (155, 41, (b"/box", b"/box")),
    "chroot": (161, 51, (b"/box",)),
    "ptrace": (101, 117, (16, 1, 0, 0)),
    "ptrace traceme": (101, 117, (0, 0, 0, 0)),
    "process_vm_readv": (310, 270, (1, 0, 0, 0, 0, 0)),
    "pidfd_getfd": (438, 438, (0, 0, 0)),
    "bpf": (321, 280, (0, 0, 0)),
    "keyctl": (250, 219, (0, -3, 1)),
    "add_key": (248, 217, (b"user", b"probe", b"x", 1, -3)),
    "request_key": (249, 218, (b"user", b"probe", 0, -3)),
    "io_uring_setup": (425, 425, (8, b"\0" * 120)),
    "perf_event_open": (298, 241, (b"\0" * 128, 0, -1, -1, 0)),
    "userfaultfd": (323, 282, (1,)),
    "memfd_create": (319, 279, (b"probe", 0)),
    "shmget": (29, 194, (0, 4096, 0o1600)),
    "open_by_handle_at": (304, 265, (-100, b"\0" * 16, 0)),
    "init_module": (175, 105, (b"", 0, b"")),
    "kexec_load": (246, 104, (0, 0, 0, 0)),
    "syslog": (103, 116, (3, b"\0" * 64, 64)),
    "sethostname": (170, 161, (b"probe", 5)),
    "setsid": (112, 157, ()),
    "mknod": (259, 33, (-100, b"/box/disk", 0o60600, 0x800)),
    "setuid 0": (117, 147, (0, 0, 0)),
}
_PATHS = """
/etc/shadow /etc/passwd /root /home /proc/1/root /proc/1/environ /proc/self/environ /proc/kcore
/proc/sysrq-trigger /sys/kernel /sys/fs/cgroup /var /run /mnt /dev/mem /dev/kmsg /dev/sda /dev/vda
/worker/../../etc/shadow
"""
_FOLDERS = "/ /etc /usr/lib /opt /dev /dev/shm /packages /worker /sys /proc"
_NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_EXPECTED = {"HOME", "PATH", "LANG", "LD_LIBRARY_PATH", "PWD", "LC_CTYPE"}


def run(secrets: Iterable[str] = ()) -> dict[str, str]:
    """Every probe's name, with what it reached or an empty string.

    Args:
        secrets: values of the host's environment that must not be found inside.
    """
    probes: dict[str, Callable[[], str]] = {
        "network of every family": _network,
        "namespaces by clone": _clone,
        "files of the host": _files,
        "writing outside the box": _writes,
        "descriptors of the host": _descriptors,
        "signals to the host": _signals,
        "privileges": _privileges,
        "secrets in the environment": lambda: _environment(secrets),
    }
    probes |= {f"system call {name}": _system_call(name) for name in _CALLS}
    return {name: probe() for name, probe in probes.items()}


def _network() -> str:
    reached = []
    for family in range(64):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            try:
                socket.socket(family, kind).close()
                reached.append(f"{family}/{int(kind)}")
            except OSError:
                pass
    return " ".join(reached)


def _system_call(name: str) -> Callable[[], str]:
    def probe() -> str:
        column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
        number, arguments = _CALLS[name][column], _CALLS[name][2]
        assert isinstance(number, int)
        return _in_child(lambda: _raw(number, *arguments) >= 0)

    return probe


def _clone() -> str:
    """clone with each namespace's flag, in a child, and clone3, which filters cannot look into."""
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    reached = [
        f"{flag:#x}"
        for flag in _NAMESPACES
        if _in_child(partial(_fork, number, flag | 17, 0, 0, 0, 0))
    ]
    if _in_child(partial(_fork, 435, b"\0" * 88, 88)):
        reached.append("clone3")
    return " ".join(reached)


def _fork(number: int, *arguments: int | bytes) -> bool:
    pid = _raw(number, *arguments)
    if pid == 0:
        os._exit(0)
    return pid > 0


def _in_child(attempt: Callable[[], bool]) -> str:
    """Try in a child, so that what succeeds does no harm to the other probes."""
    pid = os.fork()
    if pid == 0:
        os._exit(1 if attempt() else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "", 1: "succeeded"}.get(status, "")  # killed: it held


def _raw(number: int, *arguments: int | bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    return int(libc.syscall(ctypes.c_long(number), *converted))


def _files() -> str:
    reached = []
    for path in _PATHS.split():
        try:
            os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
        except OSError:
            continue
        reached.append(path)
    return " ".join(reached)


def _writes() -> str:
    reached = []
    for folder in _FOLDERS.split():
        try:
            with open(f"{folder}/probe", "wb"):
                reached.append(folder)
        except OSError:
            pass
    return " ".join(reached)


def _descriptors() -> str:
    """Three standard ones and two pipes of the worker; none is a file, folder or socket."""
    reached = []
    for fd in range(256):
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue
        if not stat.S_ISFIFO(mode) and not (fd == 0 and stat.S_ISCHR(mode)):
            reached.append(str(fd))
    return " ".join(reached)


def _signals() -> str:
    """Signal all that can be signalled; the caller looks at what is outside, from there."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    return ""


def _privileges() -> str:
    reached = [f"uid {os.getuid()}"] if 0 in (os.getuid(), os.geteuid(), os.getgid()) else []
    if 0 in os.getgroups():
        reached.append(f"groups {os.getgroups()}")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(ctypes.byref(header), ctypes.byref(data)) or data[0] or data[1] or data[3]:
        reached.append(f"capabilities {data[0]:#x} {data[1]:#x}")
    if libc.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        reached.append("new privileges")
    return ", ".join(reached)


def _environment(secrets: Iterable[str]) -> str:
    """What is not of the box's making, or has a secret in it."""
    return " ".join(
        name
        for name, value in os.environ.items()
        if name not in _EXPECTED or any(secret in value for secret in secrets)
    )
