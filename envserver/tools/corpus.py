"""Local documents with SQLite's full-text search: the provider that needs no network."""

import asyncio
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from envserver.tools.search import Hit

MAX_QUERY_CHARS = 200
SNIPPET_TOKENS = 24
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One page of a corpus."""

    address: str
    """Its name, unique in the corpus."""
    title: str
    text: str


class Corpus:
    """A SearchProvider over documents, in memory or in a file that is made once.

    One corpus serves all episodes; queries run in threads, one at a time.
    """

    def __init__(self, documents: Iterable[Document] = (), path: str = ":memory:") -> None:
        """Add documents to the corpus at a path, which a file keeps."""
        self._lock = threading.Lock()
        self._connection = open_database(path)
        self._connection.execute(
            "CREATE VIRTUAL TABLE IF NOT EXISTS documents USING"
            " fts5(address UNINDEXED, title, body, tokenize='porter unicode61')"
        )
        self._connection.execute("BEGIN")
        rows = ((document.address, document.title, document.text) for document in documents)
        self._connection.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
        self._connection.execute("COMMIT")

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        """The best documents that hold all words of the query, or else any of them."""
        return await asyncio.to_thread(self._search, query, limit)

    async def page(self, address: str) -> str:
        """A document's text. Raises KeyError if there is none at the address."""
        return await asyncio.to_thread(self._page, address)

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _search(self, query: str, limit: int) -> Sequence[Hit]:
        select = (
            f"SELECT address, title, snippet(documents, 2, '', '', '...', {SNIPPET_TOKENS})"
            " FROM documents WHERE documents MATCH ? ORDER BY rank LIMIT ?"
        )
        for expression in match_expressions(query):
            with self._lock:
                rows = self._connection.execute(select, (expression, limit)).fetchall()
            if rows:
                return [
                    Hit(address=address, title=title, snippet=" ".join(snippet.split()))
                    for address, title, snippet in rows
                ]
        return []

    def _page(self, address: str) -> str:
        query = "SELECT body FROM documents WHERE address = ?"
        with self._lock:
            row = self._connection.execute(query, (encodable(address),)).fetchone()
        if row is None:
            raise KeyError(address)
        return str(row[0])


def match_expressions(query: str) -> Iterator[str]:
    """FTS5 expressions for all words of a query, then for any; no word is read as syntax."""
    words = [f'"{word}"' for word in _WORD.findall(query[:MAX_QUERY_CHARS])]
    if words:
        yield " AND ".join(words)
        yield " OR ".join(words)


def encodable(text: str) -> str:
    """Text with lone surrogates replaced, which SQLite could not take."""
    return text.encode("utf-8", "replace").decode()


def open_database(path: str = ":memory:") -> sqlite3.Connection:
    """A database for calls from any thread, one at a time."""
    return sqlite3.connect(path, check_same_thread=False, isolation_level=None)
