"""The built-in suite `practice`: GAIA-shaped tasks over small worlds, with real tools.

domain.py      what a domain of tasks is: fields, words, calls; another suite has another one
people.py      the domain of this suite: people, companies and cities
names.py       the words that its worlds draw from
world.py       a world per task: entities tied together at random
attachment.py  the table that some tasks come with
chains.py      chains of tool calls and the noun phrases that ask for them
tasks.py       (split, ordinal) -> Task, a pure function; GAIA's record format
records.py     the world in SQLite: record look-up and full-text search
tools.py       the four tools: schemas, checks, observations
suite.py       PracticeSuite and its Environment, graded by GAIA's rules
mcp_server.py  a task's tools as an MCP server
expert.py      the scripted expert, exact or careless
demonstrate.py writes the expert's episodes as chat JSON lines
"""

from envserver.suites.practice.suite import PracticeEnvironment, PracticeSuite

__all__ = ["PracticeEnvironment", "PracticeSuite"]
