"""Search and page reading, over whatever provides them.

A provider of web search is a class with these two methods; an environment's author makes one and
hands it to the tools, as Corpus is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from envserver.tools.tool import Observation, Tool, describe

NUM_HITS = 5
PAGE_CHARS = 12_000


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result of a search."""

    address: str
    """What `page` takes."""
    title: str
    snippet: str


class SearchProvider(Protocol):
    """Finds pages and reads them."""

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        """The best pages, best first; none if nothing matches."""

    async def page(self, address: str) -> str:
        """A page's text. Raises KeyError if there is none at the address."""


class Search(Tool):
    """Finds pages."""

    spec = describe("search", "Search documents.", query="A few words")

    def __init__(self, provider: SearchProvider) -> None:
        """Take what finds pages."""
        self._provider = provider

    async def call(self, **arguments: Any) -> Observation:
        """Address, title and snippet of the best pages."""
        hits = await self._provider.search(arguments["query"], NUM_HITS)
        if not hits:
            raise ValueError("Nothing found; try other words.")
        lines = [f"{hit.address} | {hit.title}\n  {hit.snippet}" for hit in hits]
        return Observation(text="\n".join(lines))


class OpenPage(Tool):
    """Reads a page that a search found."""

    spec = describe(
        "open_page",
        "Read a page that a search found.",
        address="The page's address",
        optional={"part": {"type": "integer", "description": "Which part of a long page, from 1"}},
    )

    def __init__(self, provider: SearchProvider) -> None:
        """Take what reads pages."""
        self._provider = provider

    async def call(self, **arguments: Any) -> Observation:
        """One part of the page's text, and how many there are."""
        part = arguments.get("part", 1)
        try:
            text = await self._provider.page(arguments["address"])
        except KeyError:
            raise ValueError("No such page; use an address that a search found.") from None
        return Observation(text=cut(text, part))


def cut(text: str, part: int) -> str:
    """Part `part`, from 1, of a text, with a note if there are several. Raises ValueError."""
    num_parts = max(-(-len(text) // PAGE_CHARS), 1)
    if not 1 <= part <= num_parts:
        raise ValueError(f"No such part; there are {num_parts}.")
    note = f"[part {part} of {num_parts}]\n" if num_parts > 1 else ""
    return note + text[(part - 1) * PAGE_CHARS : part * PAGE_CHARS]
