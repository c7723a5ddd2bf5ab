"""The transfer suite: the skills of practice, and none of its words."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import ROOT
from envserver.environment import Action, ToolCall, ToolSpec
from envserver.registry import load_suites
from envserver.suites.practice import PracticeSuite
from envserver.suites.practice import tools as practice_tools
from envserver.suites.practice.demonstrate import demonstrate, demonstrations
from envserver.suites.practice.domain import Domain
from envserver.suites.practice.expert import ExactExpert
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.tasks import CALLS_BY_LEVEL, LEVELS, make_task
from envserver.suites.practice.tools import UNKNOWN_TOOL
from envserver.suites.practice.world import parity_of
from envserver.suites.transfer import TransferSuite
from envserver.suites.transfer.tools import TOOLS, Instruments, combine
from envserver.suites.transfer.waters import WATERS

NUM_TASKS = 600
FUNCTION_WORDS = set("a about at by is it of or that the to was what with".split())  # noqa: SIM905
"""Words without a meaning of their own, which no English text can do without."""


def _words(texts: Sequence[str]) -> set[str]:
    return {word.lower() for text in texts for word in re.findall("[A-Za-z]+", text)}


def _schema_words(tools: Sequence[ToolSpec]) -> set[str]:
    """Names of tools and their arguments."""
    names = [tool.name for tool in tools]
    return _words([*names, *(name for tool in tools for name in tool.parameters["properties"])])


def _pool_words(domain: Domain) -> Iterator[str]:
    for kind, fields in domain.fields.items():
        yield from (kind, *fields)
        yield from domain.pools[kind].names
        yield from domain.pools[kind].known_for
    yield from (*domain.items, *domain.files, domain.item_column, *domain.columns)


def _questions(domain: Domain) -> set[str]:
    (*_, split) = domain.splits
    return _words([make_task(split, ordinal, domain).question for ordinal in range(NUM_TASKS)])


def test_no_entity_field_or_item_is_in_both():
    shared = _words(list(_pool_words(WATERS))) & _words(list(_pool_words(PEOPLE)))
    assert shared == {"number"} & shared


def test_no_tool_or_argument_is_in_both():
    assert not _schema_words(TOOLS) & _schema_words(practice_tools.TOOLS)
    assert not {tool.name for tool in TOOLS} & _words(list(_pool_words(PEOPLE)))


def test_questions_and_descriptions_share_function_words_only():
    texts = [[tool.description, json.dumps(tool.parameters["properties"])] for tool in TOOLS]
    said = _questions(WATERS) | _words(
        [TransferSuite.prompt, *(text for two in texts for text in two)]
    )
    known = _questions(PEOPLE) | _words([PracticeSuite.prompt])
    for tool in practice_tools.TOOLS:
        known |= _words([tool.description, json.dumps(tool.parameters["properties"])])
    schema = {"type", "string", "description"}  # of JSON schemas, which every tool has
    assert said & known - schema <= FUNCTION_WORDS


def test_no_result_of_a_tool_reads_as_practices():
    """Demonstrations of practice hold every word that a policy can have learned from."""
    seen = set()
    for demonstration in demonstrations(200, seed=0):
        seen |= _words([message["content"] for message in demonstration["messages"]])
    for ordinal in range(100):
        environment = TransferSuite().open("test", ordinal)
        episode = demonstrate(environment, ExactExpert(environment.task, WATERS))
        results = [m["content"] for m in episode["messages"] if m["role"] == "tool"]
        assert not _words(results) & seen


def test_the_expert_solves_every_task_within_its_calls():
    num_calls: dict[int, set[int]] = {level: set() for level in LEVELS}
    for ordinal in range(NUM_TASKS):
        environment = TransferSuite().open("test", ordinal)
        episode = demonstrate(environment, ExactExpert(environment.task, WATERS))
        assert episode["reward"] == 1.0
        num_calls[episode["level"]].add(sum("tool_calls" in m for m in episode["messages"]))
    for level, (fewest, most) in CALLS_BY_LEVEL.items():
        assert num_calls[level] == set(range(fewest, most + 1))


def test_tools_that_tasks_take_are_their_tags():
    used = set()
    for ordinal in range(60):
        tags = TransferSuite().open("test", ordinal).reset().tags
        used |= set(tags)
    assert used == {tool.name for tool in TOOLS}


def test_it_is_never_trained():
    suite = TransferSuite()
    assert suite.describe().splits == {"test": 3_000}
    with pytest.raises(KeyError, match="learned elsewhere and has the split test only"):
        suite.open("train", 0)
    for ordinal in (-1, 3_000):
        with pytest.raises(KeyError):
            suite.open("test", ordinal)


def test_a_task_is_a_pure_function_of_its_ordinal():
    first, second = ([make_task("test", n, WATERS) for n in range(60)] for _ in range(2))
    assert first == second
    assert len({task.question for task in first}) == 60
    assert {parity_of(task.world) for task in first} == {1}
    assert TransferSuite().describe().digest == TransferSuite().describe().digest
    assert TransferSuite().describe().digest != PracticeSuite().describe().digest


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("atlas", {}, "Wrong arguments; atlas takes category, subject, property."),
        (
            "atlas",
            {"category": "sea", "subject": "x", "property": "y"},
            "Unknown category; use riv",
        ),
        ("atlas", {"category": "lake", "subject": "x", "property": "y"}, "Unknown subject"),
        ("sightings", {"sign": "otter\ud800"}, "Never seen; try one plural noun."),
        ("gauge", {"sheet": "a", "hour": "b", "reading": "c"}, "Unknown sheet; use "),
        ("combine", {"mode": "add", "left": "1", "right": 2}, "Wrong type; left is an integer."),
        (
            "combine",
            {"mode": "times", "left": 1, "right": 2},
            "Unknown mode; use add or subtract.",
        ),
        ("combine", {"mode": "add", "left": 10**5000, "right": 2}, "Too large an integer."),
        ("lookup", {"entity": "Mara", "field": "age"}, "Unknown tool; use atlas, sightings, "),
    ],
)
def test_a_bad_call_is_answered_by_a_short_remedy(name, arguments, said):
    task = next(t for t in (make_task("test", n, WATERS) for n in range(99)) if t.attachment)
    instruments = Instruments(task.world, task.attachment)
    observation, outcome = instruments.call(ToolCall(name=name, arguments=arguments))
    assert observation.startswith(said)
    assert not outcome.ok
    assert outcome.name == (name if name != "lookup" else UNKNOWN_TOOL)


def test_arguments_may_come_in_any_order():
    task = make_task("test", 0, WATERS)
    river = task.world.entities["river"][0]
    arguments = {"property": "length", "subject": river, "category": "River"}
    observation, outcome = Instruments(task.world, None).call(
        ToolCall(name="atlas", arguments=arguments)
    )
    assert outcome.ok
    assert observation == f"{river} | length | {task.world.facts[river]['length']}"


def test_without_a_sheet_the_gauge_says_so():
    call = ToolCall(name="gauge", arguments={"sheet": "a", "hour": "b", "reading": "c"})
    observation, _ = Instruments(make_task("test", 0, WATERS).world, None).call(call)
    assert observation == "No file is attached."


def test_sums():
    assert (combine("add", 2, 3), combine("subtract", 2, 3)) == ("add | 5", "subtract | -1")


def test_an_answer_in_a_sentence_is_graded_as_practice_grades_it():
    environment = TransferSuite().open("test", 0)
    environment.reset()
    answer = environment.task.answer
    step = environment.step(Action(text=f"So.\nFINAL ANSWER: {answer}"))
    assert (step.reward, step.terminated) == (1.0, True)


def test_it_is_registered():
    line = 'practice-transfer = "envserver.suites.transfer:TransferSuite"'
    assert line in Path(ROOT / "pyproject.toml").read_text()
    table = {"practice-transfer": {"adapter": "envserver.suites.transfer:TransferSuite"}}
    assert list(load_suites(table)) == ["practice-transfer"]
