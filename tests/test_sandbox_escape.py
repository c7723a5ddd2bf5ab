"""Every attempt to get out of a box or to outgrow it is held; one that is not is told."""

import asyncio
import logging
from functools import cache

import pytest

from envserver.sandbox import Layout, Limits, layout, selftest
from envserver.sandbox.selftest import Report, open_sandbox, self_test
from sandbox_helpers import needs_bwrap
from understudy.config import SandboxConfig
from understudy.errors import ConfigError

HELD = """
network of every family
namespaces by clone
system call unshare user
system call unshare mount
system call unshare net
system call setns
system call mount
system call mount proc
system call remount writable
system call umount
system call pivot_root
system call chroot
system call open_tree
system call fsopen
system call mknod
system call ptrace
system call ptrace traceme
system call process_vm_readv
system call pidfd_getfd
system call bpf
system call keyctl
system call add_key
system call request_key
system call io_uring_setup
system call perf_event_open
system call userfaultfd
system call memfd_create
system call shmget
system call open_by_handle_at
system call init_module
system call kexec_load
system call syslog
system call sethostname
system call setsid
system call setuid 0
files of the host
writing outside the box
descriptors of the host
signals to the host
privileges
secrets in the environment
fork bomb
2 GiB allocation
memory of many processes
100 MB file
a million files
endless loop
1 GB of output
a daemon that outlives the kill
""".strip().splitlines()


@cache
def report() -> Report:
    """One self-test of this machine, for all tests."""
    return asyncio.run(self_test(Layout.find()))


@needs_bwrap
@pytest.mark.parametrize("probe", HELD)
def test_a_box_holds(probe: str) -> None:
    assert report().results[probe] == ""


@needs_bwrap
def test_the_self_test_has_no_other_probes_and_names_its_layers() -> None:
    assert set(report().results) == set(HELD)
    assert "seccomp" in report().layers
    assert "missing" not in report().layers


@needs_bwrap
def test_a_sandbox_with_holes_is_told_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = layout._mounts

    def leaky(limits: Limits) -> tuple[str, ...]:
        options = [word for word in mounts(limits)]
        return ("--ro-bind", "/etc", "/etc", "--tmpfs", "/home", *options[:-4])

    monkeypatch.setattr(layout, "_mounts", leaky)
    monkeypatch.setattr("envserver.sandbox.seccomp.is_available", lambda: False)
    monkeypatch.setattr(selftest, "ATTEMPTS", {})
    monkeypatch.setenv("HOME", "/nowhere")
    found = asyncio.run(self_test(Layout.find())).reached
    assert "/etc/passwd" in found["files of the host"]
    assert "system call memfd_create" in found
    assert "network of every family" in found
    with pytest.raises(
        ConfigError, match="the sandbox does not hold .*/etc/passwd.*docs/sandbox.md"
    ):
        asyncio.run(open_sandbox(SandboxConfig()))


def test_without_bwrap_nothing_is_served_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        asyncio.run(open_sandbox(SandboxConfig()))

    async def ask() -> str:
        pool = await open_sandbox(SandboxConfig(unsafe=True, warm_boxes=1, call_seconds=2))
        box = await pool.take()
        reply = await box.call("python", code="1 + 1")
        ended = await box.call("python", code="while True: pass")
        await pool.close()
        return reply.output + ended.outcome

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(ask()) == "2\ntime"
    assert "NO SANDBOX" in caplog.text
