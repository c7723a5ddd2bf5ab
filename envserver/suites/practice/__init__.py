"""The built-in suite `practice`: GAIA-shaped tasks over small worlds, with real tools.

world.py       a world per task: people, companies and cities, tied together at random
attachment.py  the CSV file that some tasks come with
chains.py      chains of tool calls and the noun phrases that ask for them
tasks.py       (split, ordinal) -> Task, a pure function; GAIA's record format
records.py     the world in SQLite: record look-up and full-text search
calculator.py  arithmetic, parsed and never evaluated as code
tools.py       the four tools: schemas, checks, observations
suite.py       PracticeSuite and its Environment, graded by GAIA's rules
expert.py      the scripted expert, exact or careless
demonstrate.py writes the expert's episodes as chat JSON lines
"""

from envserver.suites.practice.suite import PracticeEnvironment, PracticeSuite

__all__ = ["PracticeEnvironment", "PracticeSuite"]
