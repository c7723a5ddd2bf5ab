"""The four tools of the practice suite: what the policy sees of them, and what they do.

An observation is the bare value. A call that cannot be answered is answered by one short
sentence that names the remedy; nothing of the call is echoed, and nothing is raised.
"""

from collections.abc import Callable, Mapping, Sequence

from envserver.environment import ToolCall, ToolOutcome, ToolSpec
from envserver.suites.practice.attachment import Attachment
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.records import Records
from envserver.suites.practice.world import World
from envserver.tools.calculator import Calculator, calculate
from envserver.tools.tool import UNKNOWN_TOOL, check_call, describe

TOOLS: Sequence[ToolSpec] = (
    describe(
        "lookup",
        "Look up one field of a named person, company or city.",
        entity="Name of the entity",
        field="employer, hometown or age of a person; headquarters, founder or staff of a company;"
        " mayor or population of a city",
    ),
    describe(
        "search",
        "Search documents for a hobby, a product or a landmark to find whose it is.",
        query="One or two words",
    ),
    describe(
        "read_csv",
        "Read one cell of the attached CSV file.",
        file="File name",
        row="Item in the first column",
        column="quantity or price",
    ),
    Calculator.spec,
)


class TaskTools:
    """The tools of one episode."""

    def __init__(
        self, tools: Sequence[ToolSpec], functions: Mapping[str, Callable[..., str]]
    ) -> None:
        """Take tools and what they do: a function of the arguments, which raises ValueError with
        a remedy for a call that cannot be answered."""
        self.specs = tools
        self._by_name = {tool.name: tool for tool in tools}
        self._functions = functions

    def call(self, call: ToolCall) -> tuple[str, ToolOutcome]:
        """The observation of one call, and how the call ended."""
        name = call.name if call.name in self._functions else UNKNOWN_TOOL
        try:
            return self._call(call), ToolOutcome(name=name, ok=True)
        except ValueError as error:
            return str(error), ToolOutcome(name=name, ok=False)

    def close(self) -> None:
        """Free what the tools hold."""

    def _call(self, call: ToolCall) -> str:
        check_call(call, self._by_name)
        properties = self._by_name[call.name].parameters["properties"]
        return self._functions[call.name](**{name: call.arguments[name] for name in properties})


class Toolbox(TaskTools):
    """The practice suite's tools, bound to a world and an attachment."""

    def __init__(self, world: World, attachment: Attachment | None) -> None:
        self._records = Records(world)
        self._attachment = attachment
        functions: dict[str, Callable[..., str]] = {
            "lookup": self._records.lookup,
            "search": self._records.search,
            "read_csv": self._read_csv,
            "calculate": calculate,
        }
        super().__init__(TOOLS, functions)

    def close(self) -> None:
        """Free the records."""
        self._records.close()

    def _read_csv(self, **cell: str) -> str:
        return read_cell(self._attachment, PEOPLE.columns, **cell)


def read_cell(attachment: Attachment | None, columns: Sequence[str], /, **cell: str) -> str:
    """A cell of the attachment, by file, row and column as the tool itself calls them.

    Raises ValueError, with a remedy in the tool's words, if there is none.
    """
    (of_file, file), (of_row, row), (of_column, column) = cell.items()
    if attachment is None:
        raise ValueError("No file is attached.")
    if file != attachment.file_name:
        raise ValueError(f"Unknown {of_file}; use {attachment.file_name}.")
    table = attachment.table()
    if row not in table:
        raise ValueError(f"Unknown {of_row}; use {', '.join(table)}.")
    if column not in columns:
        raise ValueError(f"Unknown {of_column}; use {' or '.join(columns)}.")
    return table[row][column]
