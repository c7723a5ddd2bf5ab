"""The suite `gaia`: General AI Assistants (arXiv 2311.12983), from the user's own copy.

The data set is gated and its terms forbid to reshare it: nothing of it is in this repository.

data.py   rows of the copy, parquet or JSON lines, checked -> GaiaTask
suite.py  GaiaSuite, its Environment and its tools; answers are scored by gaia_scoring
"""

from envserver.suites.gaia.suite import GaiaOptions, GaiaSuite

__all__ = ["GaiaOptions", "GaiaSuite"]
"""Registered as the suite `gaia`; `[envserver.suites.gaia]` has its options."""
