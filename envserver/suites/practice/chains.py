"""Chains of tool calls, and the noun phrases that ask for what they find.

A chain starts at a name, at a word to search for, or at a cell, and then follows fields:

    the age of Mara                                     lookup
    the person who likes chess                          search
    the price of lamps in sales.csv                     read_csv
    the staff of the employer of Mara                   lookup, lookup
    the age of the mayor of the city with a castle      search, lookup, lookup
"""

from dataclasses import dataclass
from random import Random

from envserver.environment import ToolCall
from envserver.suites.practice.attachment import Attachment
from envserver.suites.practice.domain import NUMBER, Domain
from envserver.suites.practice.world import World

PREVIOUS = "<previous>"
"""Stands in a planned call for the entity that the call before it found."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A noun phrase, the calls that find what it names, and what that is."""

    phrase: str
    calls: tuple[ToolCall, ...]
    """Planned calls in order; all but the first refer to `PREVIOUS`."""
    kind: str
    """Kind of the result: a kind of entity, or a number."""
    result: str


class Chains:
    """Draws the chains of one task."""

    def __init__(self, rng: Random, domain: Domain, world: World, attachment: Attachment) -> None:
        self._rng = rng
        self._domain = domain
        self._world = world
        self._attachment = attachment

    def draw(self, num_calls: int, *, to_number: bool) -> Chain:
        """A chain of `num_calls`, that ends at a number if it has to."""
        kind = self._rng.random()
        if num_calls == 1 and kind < 0.3:
            return self._cell()
        if kind > 0.75 and not (num_calls == 1 and to_number):
            return self._searched(num_calls, to_number)
        return self._named(num_calls, to_number)

    def _named(self, num_calls: int, to_number: bool) -> Chain:
        """A chain of `num_calls` look-ups from a named entity."""
        kind, path = self._path(num_calls, to_number)
        name = self._rng.choice(self._world.entities[kind])
        start = Chain(phrase=name, calls=(), kind=kind, result=name)
        return self._follow(start, name, path)

    def _searched(self, num_calls: int, to_number: bool) -> Chain:
        """One search and `num_calls - 1` look-ups; a search alone finds no number."""
        kind, path = self._path(num_calls - 1, to_number)
        name = self._rng.choice(self._world.entities[kind])
        clue = self._world.known_for[name]
        start = Chain(
            phrase=self._domain.clues[kind].format(clue),
            calls=(self._domain.search(clue),),
            kind=kind,
            result=name,
        )
        return self._follow(start, PREVIOUS, path)

    def _cell(self) -> Chain:
        """A chain of one call: a cell of the attachment."""
        table, file = self._attachment.table(), self._attachment.file_name
        row, column = self._rng.choice(list(table)), self._rng.choice(self._domain.columns)
        return Chain(
            phrase=self._domain.cell.format(column=column, row=row, file=file),
            calls=(self._domain.read_cell(file, row, column),),
            kind=NUMBER,
            result=table[row][column],
        )

    def _path(self, num_fields: int, to_number: bool) -> tuple[str, tuple[str, ...]]:
        domain = self._domain
        return self._rng.choice(
            (domain.paths_to_numbers if to_number else domain.paths)[num_fields]
        )

    def _follow(self, start: Chain, entity: str, path: tuple[str, ...]) -> Chain:
        """Extend `start` by look-ups along `path`; the first one names its `entity`."""
        phrase, calls, kind, result = start.phrase, list(start.calls), start.kind, start.result
        for field in path:
            phrase = self._domain.of.format(field=field, entity=phrase)
            calls.append(self._domain.look_up(kind, entity, field))
            kind, entity = self._domain.fields[kind][field], PREVIOUS
            result = self._world.facts[result][field]
        return Chain(phrase=phrase, calls=tuple(calls), kind=kind, result=result)
