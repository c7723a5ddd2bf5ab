"""Boxes for tools that run code or read files.

limits.py    what a box may use, how a call can end
layout.py    the command line: namespaces, mounts, rights
seccomp.py   the system calls that are allowed
inside/      what runs in a box: the worker, Landlock, file readers, the self-test's probes
usage.py     what a box's processes use together
box.py       one box, asked over pipes
pool.py      boxes that stand ready; an episode's workspace
selftest.py  tries to get out, at the server's start
"""

from envserver.sandbox.box import Box
from envserver.sandbox.layout import Layout
from envserver.sandbox.limits import Limits, Outcome, Reply
from envserver.sandbox.pool import Pool, Workspace

__all__ = ["Box", "Layout", "Limits", "Outcome", "Pool", "Reply", "Workspace"]
