"""A scripted expert that plays tasks by their plan, and a careless one for practice tasks.

A careless expert errs as people do: it asks for the wrong field or about the wrong entity,
stops early, skips the calculation or mistakes its operator. What follows from an error is
played honestly; an observation that says the call was wrong makes it give up and answer.
"""

import re
from collections.abc import Callable, Generator, Iterable
from random import Random

from envserver.environment import Action, Step, ToolCall
from envserver.suites.practice.chains import PREVIOUS
from envserver.suites.practice.domain import Domain
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.tasks import Task

GIVES_UP = "unknown"
"""The answer of an expert that has found nothing."""

_WORD = re.compile("[A-Za-z]+")


class ExactExpert:
    """Plays one task of any domain by its plan."""

    def __init__(self, task: Task, domain: Domain) -> None:
        self._task = task
        self._domain = domain
        self._found: list[str] = []

    def actions(self) -> Generator[Action, Step, None]:
        """Yield one call a turn, then the answer; send in what the environment says to each."""
        results = []
        for chain in self._task.chains:
            previous = ""
            for planned in chain.calls:
                call = self._choose(_bind(planned, previous))
                if call is None or not (yield from self._play(call)):
                    yield self._answer()
                    return
                previous = self._found[-1]
            results.append(previous)
        if self._task.operator is not None:
            operator = self._choose_operator(self._task.operator)
            if operator is not None:
                left, right = results
                yield from self._play(self._domain.calculate(left, operator, right))
        yield self._answer()

    def _choose(self, call: ToolCall) -> ToolCall | None:
        """The call that is made in place of the planned one; None stops early."""
        return call

    def _choose_operator(self, operator: str) -> str | None:
        """The sign that is calculated with; None skips the calculation."""
        return operator

    def _play(self, call: ToolCall) -> Generator[Action, Step, bool]:
        """Make a call; keep what it finds, and say whether it was answered."""
        step = yield Action(tool_calls=(call,))
        if not step.tool_outcomes[0].ok:
            return False
        self._found.append(self._domain.find(call, step.messages[0].content))
        return True

    def _answer(self) -> Action:
        return Action(text=self._found[-1] if self._found else GIVES_UP)


class Expert(ExactExpert):
    """Plays one practice task; at every call it errs with probability `carelessness`."""

    def __init__(self, task: Task, rng: Random, carelessness: float = 0.0) -> None:
        super().__init__(task, PEOPLE)
        self._rng = rng
        self._carelessness = carelessness

    def _errs(self) -> bool:
        return self._rng.random() < self._carelessness

    def _choose(self, call: ToolCall) -> ToolCall | None:
        """The call, or an error in its place; None stops early."""
        if not self._errs():
            return call
        if self._found and self._rng.random() < 1 / 3:
            return None
        wrong: dict[str, Callable[..., dict[str, str]]] = {
            "lookup": self._wrong_lookup,
            "search": self._wrong_search,
            "read_csv": self._wrong_cell,
        }
        return ToolCall(name=call.name, arguments=wrong[call.name](**call.arguments))

    def _wrong_lookup(self, entity: str, field: str) -> dict[str, str]:
        """Another field of the same record, or a name read elsewhere in the conversation."""
        words = _WORD.findall(self._task.question) + self._found
        names = [word for word in words if word in self._task.world.facts and word != entity]
        if names and self._rng.random() < 0.5:
            return {"entity": self._rng.choice(names), "field": field}
        record = next(fields for fields in PEOPLE.fields.values() if field in fields)
        return {"entity": entity, "field": self._other(record, field)}

    def _wrong_search(self, query: str) -> dict[str, str]:
        return {"query": self._other(self._task.world.known_for.values(), query)}

    def _wrong_cell(self, file: str, row: str, column: str) -> dict[str, str]:
        assert self._task.attachment is not None
        if self._rng.random() < 0.5:
            return {"file": file, "row": row, "column": self._other(PEOPLE.columns, column)}
        rows = self._task.attachment.table()
        return {"file": file, "row": self._other(rows, row), "column": column}

    def _choose_operator(self, operator: str) -> str | None:
        """The sign, or the wrong one; None skips the calculation."""
        if not self._errs():
            return operator
        if self._rng.random() < 0.5:
            return None
        return "-" if operator == "+" else "+"

    def _other(self, options: Iterable[str], chosen: str) -> str:
        return self._rng.choice([option for option in options if option != chosen])


def _bind(planned: ToolCall, previous: str) -> ToolCall:
    """A planned call with the entity that the call before it found."""
    arguments = {
        name: previous if value == PREVIOUS else value for name, value in planned.arguments.items()
    }
    return ToolCall(name=planned.name, arguments=arguments)
