"""What a domain of tasks is: its world, its words and its tools, not how tasks are made of them.

The generator (world.py, chains.py, tasks.py) and the exact expert are the same for every domain, so
that two of them ask for the same skills: look-ups in chains, a search, a cell of a table, a sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from envserver.environment import ToolCall

NUMBER = "number"
"""The kind of values that can be calculated with; all other kinds are of entities."""
MAX_FIELDS = 3
"""Look-ups in a chain, at most."""

Paths = list[tuple[str, tuple[str, ...]]]
"""Kinds of entities to start from, each with fields to follow."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What the entities of one kind are drawn from."""

    names: Sequence[str]
    known_for: Sequence[str]
    """What only a search tells of an entity, a word each."""
    num: int
    """Entities of the kind in a world."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Facts and words of one domain."""

    name: str
    """Of the suite; begins its tasks' ids."""
    version: str
    """Of the generator's seeds."""
    splits: Mapping[str, int]
    """Split -> number of tasks."""
    parity: Mapping[str, int]
    """Split -> sum modulo 2 of all numbers of its worlds."""
    fields: Mapping[str, Mapping[str, str]]
    """Kind of entity -> its fields -> the kind of each field's value."""
    pools: Mapping[str, Pool]
    clues: Mapping[str, str]
    """Kind -> phrase for the entity that is known for `{}`."""
    of: str
    """Phrase for the `{field}` of an `{entity}`."""
    cell: str
    """Phrase for a cell: `{column}`, `{row}`, `{file}`."""
    openings: Sequence[str]
    """Sentences that ask for `{}`."""
    openings_of: Mapping[str, Sequence[str]]
    """Those of kinds that are asked for in another way; as many."""
    operators: Mapping[str, str]
    """What stands between two phrases: first that of `+`, then that of `-`."""
    files: Sequence[str]
    """Names of attachments; `.tsv` has tabs, all others commas."""
    items: Sequence[str]
    """What an attachment's rows are of; its first column is called `item_column`."""
    item_column: str
    columns: Sequence[str]
    look_up: Callable[[str, str, str], ToolCall]
    """The call that looks up (kind, entity, field)."""
    search: Callable[[str], ToolCall]
    """The call that searches for what an entity is known for."""
    read_cell: Callable[[str, str, str], ToolCall]
    """The call that reads (file, row, column)."""
    calculate: Callable[[str, str, str], ToolCall]
    """The call that works out (left, sign, right), of which left and right are numbers."""
    find: Callable[[ToolCall, str], str]
    """What a call's observation tells: a name or a number."""

    @property
    def kinds(self) -> Sequence[str]:
        """Kinds of entities, in order."""
        return tuple(self.fields)

    def end(self, kind: str, path: Sequence[str]) -> str:
        """The kind of what is found along fields."""
        for field in path:
            kind = self.fields[kind][field]
        return kind

    @cached_property
    def paths(self) -> Sequence[Paths]:
        """By number of fields: all ways to follow as many."""
        return [
            [(kind, path) for kind in self.kinds for path in self._paths(kind, num_fields)]
            for num_fields in range(MAX_FIELDS + 1)
        ]

    @cached_property
    def paths_to_numbers(self) -> Sequence[Paths]:
        """Those that end at a number."""
        return [
            [(kind, path) for kind, path in paths if self.end(kind, path) == NUMBER]
            for paths in self.paths
        ]

    def _paths(self, kind: str, num_fields: int) -> list[tuple[str, ...]]:
        """All ways to follow `num_fields` fields from an entity of a kind."""
        if num_fields == 0:
            return [()]
        return [
            (field, *rest)
            for field, target in self.fields[kind].items()
            if target != NUMBER or num_fields == 1
            for rest in self._paths(target, num_fields - 1)
        ]
