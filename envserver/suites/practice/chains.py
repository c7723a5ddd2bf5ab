"""Chains of tool calls, and the noun phrases that ask for what they find.

A chain starts at a name, at a word to search for, or at a CSV cell, and then follows fields:

    the age of Mara                                     lookup
    the person who likes chess                          search
    the price of lamps in sales.csv                     read_csv
    the staff of the employer of Mara                   lookup, lookup
    the age of the mayor of the city with a castle      search, lookup, lookup
"""

from dataclasses import dataclass
from random import Random

from envserver.environment import ToolCall
from envserver.suites.practice.attachment import COLUMNS, Attachment
from envserver.suites.practice.world import CITY, COMPANY, FIELDS, KINDS, NUMBER, PERSON, World

PREVIOUS = "<previous>"
"""Stands in a planned call for the entity that the call before it found."""

MAX_FIELDS = 3

_CLUES = {
    PERSON: "the person who likes {}",
    COMPANY: "the company that makes {}",
    CITY: "the city with a {}",
}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A noun phrase, the calls that find what it names, and what that is."""

    phrase: str
    calls: tuple[ToolCall, ...]
    """Planned calls in order; all but the first refer to `PREVIOUS`."""
    kind: str
    """Kind of the result: a kind of entity, or a number."""
    result: str


def _paths(kind: str, num_fields: int) -> list[tuple[str, ...]]:
    """All ways to follow `num_fields` fields from an entity of a kind."""
    if num_fields == 0:
        return [()]
    return [
        (field, *rest)
        for field, target in FIELDS[kind].items()
        if target != NUMBER or num_fields == 1
        for rest in _paths(target, num_fields - 1)
    ]


def _end(kind: str, path: tuple[str, ...]) -> str:
    for field in path:
        kind = FIELDS[kind][field]
    return kind


_ALL = {
    n: [(kind, path) for kind in KINDS for path in _paths(kind, n)] for n in range(MAX_FIELDS + 1)
}
_TO_NUMBERS = {
    n: [(k, p) for k, p in _ALL[n] if _end(k, p) == NUMBER] for n in range(MAX_FIELDS + 1)
}


def named_chain(rng: Random, world: World, num_calls: int, *, to_number: bool) -> Chain:
    """A chain of `num_calls` look-ups from a named entity."""
    kind, path = rng.choice((_TO_NUMBERS if to_number else _ALL)[num_calls])
    name = rng.choice(world.entities[kind])
    start = Chain(phrase=name, calls=(), kind=kind, result=name)
    return _follow(world, start, name, path)


def searched_chain(rng: Random, world: World, num_calls: int, *, to_number: bool) -> Chain:
    """A chain of one search and `num_calls - 1` look-ups; a search alone finds no number."""
    kind, path = rng.choice((_TO_NUMBERS if to_number else _ALL)[num_calls - 1])
    name = rng.choice(world.entities[kind])
    clue = world.known_for[name]
    start = Chain(
        phrase=_CLUES[kind].format(clue),
        calls=(ToolCall(name="search", arguments={"query": clue}),),
        kind=kind,
        result=name,
    )
    return _follow(world, start, PREVIOUS, path)


def cell_chain(rng: Random, attachment: Attachment) -> Chain:
    """A chain of one call: a cell of the attachment."""
    table = attachment.table()
    row, column = rng.choice(list(table)), rng.choice(COLUMNS)
    arguments = {"file": attachment.file_name, "row": row, "column": column}
    return Chain(
        phrase=f"the {column} of {row} in {attachment.file_name}",
        calls=(ToolCall(name="read_csv", arguments=arguments),),
        kind=NUMBER,
        result=table[row][column],
    )


def _follow(world: World, start: Chain, entity: str, path: tuple[str, ...]) -> Chain:
    """Extend `start` by look-ups along `path`; the first one names its `entity`."""
    phrase, calls, result = start.phrase, list(start.calls), start.result
    for field in path:
        phrase = f"the {field} of {phrase}"
        calls.append(ToolCall(name="lookup", arguments={"entity": entity, "field": field}))
        entity, result = PREVIOUS, world.facts[result][field]
    kind = _end(start.kind, path)
    return Chain(phrase=phrase, calls=tuple(calls), kind=kind, result=result)
