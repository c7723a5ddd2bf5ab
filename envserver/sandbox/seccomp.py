"""The system calls that code in a box may make; every other one answers ENOSYS.

A list of what is allowed, so that what a new kernel brings is refused until somebody looks at it.
Left out on purpose: sockets of every family, namespaces, mounts, ptrace and reading other
processes, bpf, keys, io_uring, perf, user faults, modules, clocks, System V IPC and memfds (memory
that no limit of a box counts), and setsid, which would take a process out of the scheduler's group
of its box.
"""

import ctypes.util
import errno
import importlib.util
import os
import socket
from functools import cache

NAMESPACE_FLAGS = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

_NAMES = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
open openat openat2 creat dup dup2 dup3 fcntl ioctl flock pipe pipe2 splice tee vmsplice sendfile
copy_file_range fsync fdatasync sync_file_range fallocate ftruncate truncate fadvise64 readahead
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat
renameat2 link linkat symlink symlinkat chmod fchmod fchmodat fchmodat2 chown fchown lchown
fchownat umask utime utimes utimensat futimesat getxattr lgetxattr fgetxattr listxattr llistxattr
flistxattr
mmap mmap2 munmap mremap mprotect madvise mincore msync mlock munlock brk membarrier rseq
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4
inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
execve execveat exit exit_group fork vfork wait4 waitid set_tid_address arch_prctl prctl
futex futex_waitv set_robust_list get_robust_list sched_yield sched_getaffinity sched_getparam
sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu getpriority
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigqueueinfo
sigaltstack kill tkill tgkill pause alarm getitimer setitimer restart_syscall
timer_create timer_settime timer_gettime timer_getoverrun timer_delete
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage sysinfo uname
getpid getppid gettid getpgid getpgrp getsid setpgid getuid geteuid getgid getegid getresuid
getresgid getgroups capget capset setuid setgid setreuid setregid setresuid setresgid setgroups
getrlimit setrlimit prlimit64 getrandom
sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockname getpeername getsockopt
setsockopt landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
ALLOWED = _NAMES.split()


def is_available() -> bool:
    """Whether pyseccomp and the C library behind it are installed."""
    installed = importlib.util.find_spec("pyseccomp") is not None
    return installed and ctypes.util.find_library("seccomp") is not None


@cache
def program() -> bytes:
    """The filter as BPF, for this machine's architecture. Raises ImportError without libseccomp."""
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in ALLOWED:
        # A name that this libseccomp does not know is a call that stays refused.
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != -1:
            rules.add_rule(pyseccomp.ALLOW, name)
    no_namespace = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, NAMESPACE_FLAGS, 0)
    rules.add_rule(pyseccomp.ALLOW, "clone", no_namespace)
    unix = pyseccomp.Arg(0, pyseccomp.EQ, socket.AF_UNIX)
    rules.add_rule(pyseccomp.ALLOW, "socketpair", unix)
    with os.fdopen(os.memfd_create("seccomp"), "r+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
