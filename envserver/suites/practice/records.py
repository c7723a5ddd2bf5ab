"""A world in SQLite, in memory: records by name and field, documents by full-text search.

Both tables are made on first use, because most episodes need only one of them.
"""

import re
import sqlite3
from collections.abc import Iterator
from functools import cached_property

from envserver.suites.practice.people import SENTENCES
from envserver.suites.practice.world import World
from envserver.tools.corpus import encodable, match_expressions, open_database

MAX_LINES = 2

_SENTENCE_END = re.compile(r"(?<=\.) ")


class Records:
    """What the tools `lookup` and `search` read. Calls may come from any thread, one at a time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def lookup(self, entity: str, field: str) -> str:
        """The value of an entity's field. Raises ValueError, with a remedy, if there is none."""
        query = "SELECT field, value FROM facts WHERE entity = ?"
        facts = dict(self._facts.execute(query, (encodable(entity.strip()),)))
        if not facts:
            raise ValueError("Unknown entity; use a name, or search for it.")
        value = facts.get(field.strip().lower())
        if value is None:
            raise ValueError(f"Unknown field; use {', '.join(facts)}.")
        return str(value)

    def search(self, query: str) -> str:
        """The best sentence of each of the best documents, a line each.

        A document matches if it holds all words of the query, or else any of them; nothing in
        the query is read as syntax. Raises ValueError, with a remedy, if nothing matches.
        """
        for expression in match_expressions(query):
            if lines := self._match(expression):
                return "\n".join(lines)
        raise ValueError("Nothing found; try one other word.")

    def close(self) -> None:
        """Free both tables."""
        for name in ("_facts", "_documents"):
            if name in self.__dict__:
                getattr(self, name).close()

    @cached_property
    def _facts(self) -> sqlite3.Connection:
        connection = open_database()
        connection.execute(
            "CREATE TABLE facts (entity TEXT COLLATE NOCASE, field TEXT, value TEXT,"
            " PRIMARY KEY (entity, field)) WITHOUT ROWID"
        )
        facts = self._world.facts.items()
        rows = ((name, field, value) for name, fields in facts for field, value in fields.items())
        connection.executemany("INSERT INTO facts VALUES (?, ?, ?)", rows)
        return connection

    @cached_property
    def _documents(self) -> sqlite3.Connection:
        connection = open_database()
        connection.execute(
            "CREATE VIRTUAL TABLE documents USING fts5(body, tokenize='porter unicode61')"
        )
        rows = ((document,) for document in _documents(self._world))
        connection.executemany("INSERT INTO documents VALUES (?)", rows)
        return connection

    def _match(self, expression: str) -> list[str]:
        rows = self._documents.execute(
            "SELECT highlight(documents, 0, '[', ']') FROM documents WHERE documents MATCH ?"
            " ORDER BY rank LIMIT ?",
            (expression, MAX_LINES),
        )
        return [_best_sentence(body) for (body,) in rows]


def _documents(world: World) -> Iterator[str]:
    """One short document per entity."""
    for kind, sentences in SENTENCES.items():
        for name in world.entities[kind]:
            yield sentences.format(name, known_for=world.known_for[name], **world.facts[name])


def _best_sentence(highlighted: str) -> str:
    """The first of a document's sentences with the most words matched, marks removed."""
    best = max(_SENTENCE_END.split(highlighted), key=lambda sentence: sentence.count("["))
    return best.replace("[", "").replace("]", "")
