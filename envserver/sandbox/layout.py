"""The command line that starts a box: namespaces, mounts, system calls and rights.

    root:  bwrap, which needs no user namespace then; within it setpriv changes to a user of the
           box's own, so that the kernel counts its processes by themselves; no capability is left
    user:  bwrap in a user namespace of its own, with further ones disabled
    none:  no box at all (envserver.sandbox.unsafe): the server's own rights, limits only

A box has no network, no /proc, no /sys, no /etc but the linker's cache, and one place to write, a
new tmpfs of limited size at /box. Nothing of the host is mounted writable, so that no tenant can
leave anything to the next (compare CVE-2026-87766 of bubblewrap 0.8.0). Packages of Python are
mounted one by one: a suite's own code, which makes its tasks and knows their answers, is never
inside.
"""

import importlib.util
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from envserver.sandbox.limits import Limits

INSIDE = Path(__file__).parent / "inside"
PYTHON = "/opt/python"
NAME = f"python3.{sys.version_info.minor}"
_PACKAGES = """
openpyxl et_xmlfile docx lxml typing_extensions pypdf pptx xlsxwriter PIL bs4 soupsieve defusedxml
"""
PACKAGES = _PACKAGES.split()
"""Modules that file readers need; those that are installed can be imported in a box."""
_ISOLATION = """
--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent
--hostname box --clearenv --setenv HOME /box --setenv PATH /usr/bin
--setenv LANG C.UTF-8 --cap-drop ALL
"""
USERS = range(62_000, 65_000)
"""Users that boxes run as; nobody else is likely to have them."""


def _users() -> Iterator[int]:
    start = random.randrange(len(USERS))  # another server on this machine starts elsewhere
    return itertools.cycle([*USERS[start:], *USERS[:start]])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How boxes are started on this machine."""

    kind: str
    """`root`, `user` or `none`."""
    _user: Iterator[int] = field(default_factory=_users)

    @classmethod
    def find(cls, *, unsafe: bool = False) -> "Layout":
        """The strongest layout that this process can start; `none` only if `unsafe`.

        Raises RuntimeError, naming the remedy, where bubblewrap is not installed.
        """
        if shutil.which("bwrap"):
            return cls(kind="root" if os.geteuid() == 0 else "user")
        if unsafe:
            return cls(kind="none")
        raise RuntimeError("bwrap is not installed; apt-get install bubblewrap")

    def command(self, limits: Limits, reply_fd: int, seccomp_fd: int | None) -> list[str]:
        """What to execute for one more box."""
        settings = json.dumps([rlimits(limits), self.kind != "none", reply_fd])
        options = ["-I", "-S", "-B", "-u"]
        if self.kind == "none":
            return [sys.executable, *options, str(INSIDE / "worker.py"), settings]
        python = f"{PYTHON if _is_relocated() else '/usr'}/bin/{NAME}"
        command = ["bwrap", *self.isolation(), *_mounts(limits)]
        if seccomp_fd is not None:
            command += ["--seccomp", str(seccomp_fd)]
        command += ["--", *self.change_user(), python, *options, "/worker/worker.py", settings]
        return command

    def isolation(self, *, nested: bool = False) -> list[str]:
        """Options of bwrap for namespaces and rights; `nested` for a program that has a sandbox of
        its own, and makes user namespaces for it. Whoever starts it makes a session for it."""
        options = _ISOLATION.split()
        if self.kind == "root":
            return [*options, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        return [*options, "--unshare-user", *(() if nested else ("--disable-userns",))]

    def change_user(self) -> list[str]:
        """What stands before a box's program: it becomes a user of its own, as root can."""
        if self.kind != "root":
            return []
        user = str(next(self._user))
        options = ["--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all"]
        return ["setpriv", *options, "--"]


def rlimits(limits: Limits) -> dict[str, int]:
    """Limits of each process in a box, by the names of setrlimit."""
    return {
        "AS": limits.memory_bytes,
        "NPROC": limits.processes,
        "FSIZE": limits.disk_bytes,
        "NOFILE": 256,
        "CORE": 0,
        "MEMLOCK": 0,
    }


def _is_relocated() -> bool:
    return Path(sys.base_prefix) != Path("/usr")


@cache
def _mounts(limits: Limits) -> tuple[str, ...]:
    """Read-only system, Python, packages and worker; then the one writable place, last."""
    options = ["--dir", "/opt", "--dir", "/packages", *system_mounts()]
    if _is_relocated():
        options += ["--setenv", "LD_LIBRARY_PATH", f"{PYTHON}/lib", *_python()]
    for path in _site_packages():
        options += ["--tmpfs", path, "--remount-ro", path]
    for package in _packages():
        options += ["--ro-bind", str(package), f"/packages/{package.name}"]
    options += ["--ro-bind", str(INSIDE), "/worker", "--dev", "/dev", "--remount-ro", "/dev"]
    options += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/box"]
    return (*options, "--symlink", "/box", "/tmp", "--remount-ro", "/", "--chdir", "/box")


def system_mounts() -> list[str]:
    """The system's programs and libraries, read-only."""
    options = ["--dir", "/usr", "--dir", "/etc"]
    for path in ("/usr/bin", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"):
        options += ["--ro-bind-try", path, path]
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            options += ["--symlink", f"usr{path}", path]
        else:
            options += ["--ro-bind-try", path, path]
    return options


def _python() -> Iterator[str]:
    """Mounts of the interpreter and its library, and of nothing else that lies beside them: folders
    of virtual environments often do."""
    base = Path(sys.base_prefix)
    for folder in ("", "/bin", "/lib"):
        yield from ("--dir", PYTHON + folder)
    for path in (base / "bin" / NAME, base / "lib" / NAME, *base.glob("lib/libpython3*.so*")):
        yield from ("--ro-bind", str(path), f"{PYTHON}/{path.relative_to(base)}")


def _site_packages() -> list[str]:
    """Folders of installed packages below what is mounted, which are covered up."""
    prefix = PYTHON if _is_relocated() else "/usr"
    found = []
    for lib, packages in itertools.product(("lib", "lib64"), ("site-packages", "dist-packages")):
        name = f"{lib}/{NAME}/{packages}"
        if (Path(sys.base_prefix) / name).is_dir():
            found.append(f"{prefix}/{name}")
    if Path("/usr/lib/python3/dist-packages").is_dir():
        found.append("/usr/lib/python3/dist-packages")
    return found


def _packages() -> Sequence[Path]:
    """Where the packages of a box lie on the host, without importing them."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            origin = Path(spec.origin)
            found.append(origin.parent if origin.name == "__init__.py" else origin)
    libraries = {path.parent / "pillow.libs" for path in found}
    return [*found, *(path for path in libraries if path.is_dir())]
