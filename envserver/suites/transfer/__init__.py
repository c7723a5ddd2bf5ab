"""The built-in suite `practice-transfer`: the skills of `practice`, with nothing else of it.

Other entities, other words, other tools with other schemas and results; the same generator, levels
and grading. It has a test split only: it measures whether what was learned carries over.

waters.py  the domain: rivers, lakes and peaks
tools.py   the four tools
suite.py   TransferSuite
"""

from envserver.suites.transfer.suite import TransferSuite

__all__ = ["TransferSuite"]
