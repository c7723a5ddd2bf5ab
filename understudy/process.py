"""How every process of every role starts: allocator, CPUs, logs, one event loop.

Thread counts and CPUs are set here and nowhere else, before numeric libraries are imported, so that
the roles of one machine do not starve each other. docs/operations.md has the table.
"""

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvloop

from understudy.errors import UnderstudyError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_log = logging.getLogger(__name__)


def prepare_process(role: str, cpus: Sequence[int] = (), threads: int = 1) -> None:
    """Tune the allocator, pin the process, bound its threads and set up logging.

    Args:
        role: name in log lines.
        cpus: CPUs to run on; empty leaves the choice to the kernel.
        threads: OpenMP threads of numeric libraries; effective if they are not imported yet.
    """
    _tune_allocator()
    usable = set(cpus) & os.sched_getaffinity(0)
    if usable:
        os.sched_setaffinity(0, usable)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(max(threads, 1))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _set_up_logging(role)
    if cpus and not usable:
        _log.warning("cpus %s do not exist here; running on any", list(cpus))


def _tune_allocator() -> None:
    # glibc gives large buffers back after each message: about 1,000 page faults a MB.
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    except OSError:  # another libc: its own allocator serves
        pass


class _JsonLines(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "role": self.role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _set_up_logging(role: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s %(message)s"))
    else:
        handler.setFormatter(_JsonLines(role))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpx2", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a role's main coroutine on the process's one uvloop and return the exit code.

    An UnderstudyError ends the process with its one line and code 1, Ctrl-C before there is a
    server to drain with code 130.
    """
    start = time.monotonic()
    try:
        return uvloop.run(main)
    except UnderstudyError as error:
        _log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _log.info("ended after %.1f s", time.monotonic() - start)
