"""Failpoints: where a test has a process die as if by kill -9.

`UNDERSTUDY_FAILPOINT="log.after_write:3"` kills the process the third time it comes by. Each name
stands at the one place that calls `hit` with it. Unset, a call costs one comparison.
"""

import os
import signal

_name, _, _count = os.environ.get("UNDERSTUDY_FAILPOINT", "").partition(":")
_left = int(_count or 1)


def hit(name: str) -> None:
    """Come by a failpoint."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
