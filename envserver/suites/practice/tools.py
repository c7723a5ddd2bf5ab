"""The four tools of the practice suite: what the policy sees of them, and what they do.

An observation is the bare value. A call that cannot be answered is answered by one short
sentence that names the remedy; nothing of the call is echoed, and nothing is raised.
"""

from collections.abc import Callable, Sequence

from envserver.environment import ToolCall, ToolOutcome, ToolSpec
from envserver.suites.practice.attachment import COLUMNS, Attachment
from envserver.suites.practice.calculator import calculate
from envserver.suites.practice.records import Records
from envserver.suites.practice.world import World

UNKNOWN_TOOL = "unknown"
"""Name under which calls of tools that do not exist are counted."""


def _spec(name: str, description: str, **arguments: str) -> ToolSpec:
    """A tool whose arguments are all required strings, each with its description."""
    properties = {
        argument: {"type": "string", "description": text} for argument, text in arguments.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return ToolSpec(name=name, description=description, parameters=parameters)


TOOLS: Sequence[ToolSpec] = (
    _spec(
        "lookup",
        "Look up one field of a named person, company or city.",
        entity="Name of the entity",
        field="employer, hometown or age of a person; headquarters, founder or staff of a company;"
        " mayor or population of a city",
    ),
    _spec(
        "search",
        "Search documents for a hobby, a product or a landmark to find whose it is.",
        query="One or two words",
    ),
    _spec(
        "read_csv",
        "Read one cell of the attached CSV file.",
        file="File name",
        row="Item in the first column",
        column="quantity or price",
    ),
    _spec("calculate", "Work out an arithmetic expression.", expression="For example 12 + 30"),
)
_ARGUMENTS = {tool.name: tuple(tool.parameters["required"]) for tool in TOOLS}


class Toolbox:
    """The tools of one episode, bound to its world and attachment."""

    def __init__(self, world: World, attachment: Attachment | None) -> None:
        self._records = Records(world)
        self._attachment = attachment
        self._functions: dict[str, Callable[..., str]] = {
            "lookup": self._records.lookup,
            "search": self._records.search,
            "read_csv": self._read_csv,
            "calculate": calculate,
        }

    def call(self, call: ToolCall) -> tuple[str, ToolOutcome]:
        """The observation of one call, and how the call ended."""
        name = call.name if call.name in self._functions else UNKNOWN_TOOL
        try:
            return self._call(call), ToolOutcome(name=name, ok=True)
        except ValueError as error:
            return str(error), ToolOutcome(name=name, ok=False)

    def close(self) -> None:
        """Free the records."""
        self._records.close()

    def _call(self, call: ToolCall) -> str:
        if call.name not in self._functions:
            raise ValueError(f"Unknown tool; use {', '.join(_ARGUMENTS)}.")
        expected = _ARGUMENTS[call.name]
        if set(call.arguments) != set(expected):
            raise ValueError(f"Wrong arguments; {call.name} takes {', '.join(expected)}.")
        if not all(isinstance(value, str) for value in call.arguments.values()):
            raise ValueError("Wrong type; every argument is a string.")
        return self._functions[call.name](**call.arguments)

    def _read_csv(self, file: str, row: str, column: str) -> str:
        if self._attachment is None:
            raise ValueError("No file is attached.")
        if file != self._attachment.file_name:
            raise ValueError(f"Unknown file; use {self._attachment.file_name}.")
        table = self._attachment.table()
        if row not in table:
            raise ValueError(f"Unknown row; use {', '.join(table)}.")
        if column not in COLUMNS:
            raise ValueError(f"Unknown column; use {' or '.join(COLUMNS)}.")
        return table[row][column]
