"""How much of the CPUs a box gets while others want them.

Linux divides CPUs among sessions first (autogroups, sched(7)), and a box is a session of its own:
the nice values of its processes say nothing to anybody outside. This one does.
"""

import contextlib
import os
from pathlib import Path

EQUAL, SMALL = 0, 10
"""As much as any other session; a tenth of that."""


def set_share(pid: int, nice: int) -> None:
    """Set it for all of a box, given its first process.

    Nothing happens where the kernel has no autogroups, the process has ended, or this one is not
    root: the kernel takes ten changes a second from all others together.
    """
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
