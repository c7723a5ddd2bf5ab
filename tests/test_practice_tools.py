"""The practice suite's tools, called as a policy would call them, well and badly."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from envserver.environment import ToolCall
from envserver.suites.practice.attachment import Attachment
from envserver.suites.practice.tools import TOOLS, UNKNOWN_TOOL, Toolbox
from envserver.suites.practice.world import World
from envserver.tools.calculator import calculate

WORLD = World(
    entities={"person": ["Mara", "Hugo"], "company": ["Novacorp"], "city": ["Lindvik"]},
    facts={
        "Mara": {"employer": "Novacorp", "hometown": "Lindvik", "age": "42"},
        "Hugo": {"employer": "Novacorp", "hometown": "Lindvik", "age": "31"},
        "Novacorp": {"headquarters": "Lindvik", "founder": "Hugo", "staff": "17"},
        "Lindvik": {"mayor": "Mara", "population": "88"},
    },
    known_for={"Mara": "chess", "Hugo": "tennis", "Novacorp": "boats", "Lindvik": "castle"},
)
SALES = Attachment(file_name="sales.csv", text="item,quantity,price\nlamps,12,30\npens,40,21\n")
SENTENCE_CHARS = 80


def _call(tool: str, /, **arguments: object) -> tuple[str, bool]:
    toolbox = Toolbox(WORLD, SALES)
    observation, outcome = toolbox.call(ToolCall(name=tool, arguments=arguments))
    toolbox.close()
    return observation, outcome.ok


@pytest.mark.parametrize(
    ("name", "arguments", "observation"),
    [
        ("lookup", {"entity": "Mara", "field": "age"}, "42"),
        ("lookup", {"entity": " mara ", "field": "Employer"}, "Novacorp"),
        ("lookup", {"entity": "Novacorp", "field": "headquarters"}, "Lindvik"),
        ("lookup", {"entity": "Lindvik", "field": "mayor"}, "Mara"),
        ("search", {"query": "chess"}, "Mara likes chess."),
        ("search", {"query": "boat"}, "Novacorp makes boats."),
        ("search", {"query": "a CASTLE?"}, "Lindvik has a castle."),
        ("search", {"query": "Hugo lives in"}, "Hugo lives in Lindvik."),
        ("search", {"query": "tennis castle"}, "Lindvik has a castle.\nHugo likes tennis."),
        ("read_csv", {"file": "sales.csv", "row": "lamps", "column": "price"}, "30"),
        ("read_csv", {"file": "sales.csv", "row": "pens", "column": "quantity"}, "40"),
        ("calculate", {"expression": "42 + 30"}, "72"),
    ],
)
def test_a_good_call_is_answered_by_the_bare_value(name, arguments, observation):
    assert _call(name, **arguments) == (observation, True)


@pytest.mark.parametrize(
    ("name", "arguments", "observation"),
    [
        ("browse", {}, "Unknown tool; use lookup, search, read_csv, calculate."),
        ("", {}, "Unknown tool; use lookup, search, read_csv, calculate."),
        ("lookup", {}, "Wrong arguments; lookup takes entity, field."),
        ("lookup", {"name": "Mara"}, "Wrong arguments; lookup takes entity, field."),
        ("lookup", {"entity": "Zed", "field": "age"}, "Unknown entity; use a name"),
        ("lookup", {"entity": "\0", "field": "age"}, "Unknown entity"),
        ("lookup", {"entity": "\ud800", "field": "age"}, "Unknown entity"),
        ("lookup", {"entity": "' OR 1=1 --", "field": "age"}, "Unknown entity"),
        ("lookup", {"entity": "Mara", "field": "staff"}, "Unknown field; use age, employer, "),
        ("lookup", {"entity": "Lindvik", "field": "\ud800"}, "Unknown field; use mayor, popul"),
        ("lookup", {"entity": "Mara", "field": 3}, "Wrong type; field is a string."),
        ("search", {"query": None}, "Wrong type"),
        ("search", {"query": ["chess"]}, "Wrong type"),
        ("search", {"query": "chess", "limit": 3}, "Wrong arguments; search takes query."),
        ("search", {"query": "golf"}, "Nothing found; try one other word."),
        ("read_csv", {"file": "sales.csv"}, "Wrong arguments; read_csv takes file, row, column."),
        ("read_csv", {"file": "../x", "row": "lamps", "column": "price"}, "Unknown file; use sa"),
        ("read_csv", {"file": "sales.csv", "row": "x", "column": "price"}, "Unknown row; use lam"),
        ("read_csv", {"file": "sales.csv", "row": "pens", "column": "x"}, "Unknown column; use q"),
        ("calculate", {"expression": 42}, "Wrong type"),
        ("calculate", {"expression": "age + 1"}, "Use only numbers, + - * / and brackets."),
    ],
)
def test_a_bad_call_is_answered_by_a_short_remedy(name, arguments, observation):
    answer, ok = _call(name, **arguments)
    assert answer.startswith(observation)
    assert len(answer) <= SENTENCE_CHARS
    assert not ok


def test_reading_a_file_where_none_is_attached_says_so():
    call = ToolCall(name="read_csv", arguments={"file": "a.csv", "row": "a", "column": "b"})
    observation, outcome = Toolbox(WORLD, None).call(call)
    assert (observation, outcome.ok) == ("No file is attached.", False)


def test_calls_of_unknown_tools_are_counted_under_one_name():
    _, outcome = Toolbox(WORLD, None).call(ToolCall(name="made-up-7", arguments={}))
    assert outcome.name == UNKNOWN_TOOL


@pytest.mark.parametrize(
    "query",
    [
        '"chess"', "'chess'", "chess*", "chess AND", "NOT chess", "chess NEAR/2", "body: chess",
        "^chess", "(chess", "chess)", "{chess}", "chess\0", "\0chess", "chess \ud800", "-chess",
        "chess; DROP TABLE documents", 'chess" OR "', "chess + [", "chess \\", "chess\n\n",
        "\u265e chess", "chess" + " " * 10**6,
    ],
)  # fmt: skip
def test_no_query_is_read_as_syntax(query):
    assert _call("search", query=query) == ("Mara likes chess.", True)


@pytest.mark.parametrize(
    "query", ["", " ", '"', '""', "*", "AND", "\0", "\ud800", "_", "9" * 10**6]
)
def test_a_query_without_a_match_finds_nothing(query):
    assert _call("search", query=query) == ("Nothing found; try one other word.", False)


def test_a_search_answers_two_lines_at_most():
    observation, _ = _call("search", query="Lindvik Mara Hugo Novacorp likes makes has")
    assert len(observation.splitlines()) == 2


def test_tools_work_from_any_thread():
    toolbox = Toolbox(WORLD, None)
    call = ToolCall(name="lookup", arguments={"entity": "Mara", "field": "age"})
    for _ in range(3):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(toolbox.call, call).result()[0] == "42"


def test_every_tool_has_a_schema_that_describes_its_arguments():
    for tool in TOOLS:
        assert tool.description.endswith(".")
        assert tool.parameters["required"] == list(tool.parameters["properties"])
        assert all(each["description"] for each in tool.parameters["properties"].values())


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 30", "42"),
        ("12+30", "42"),
        (" 7 - 9 ", "-2"),
        ("2 * (3 + 4)", "14"),
        ("2 + 3 * 4", "14"),
        ("10 / 4", "2.5"),
        ("500 / 5", "100"),
        ("999999999999 + 0.123456", "999999999999.123456"),
        ("1 / 3", "0.333333"),
        ("6 / 3", "2"),
        ("0.1 + 0.2", "0.3"),
        ("--3", "3"),
        ("+3 - -4", "7"),
        ("1000000 * 1000000", "1000000000000"),
        ("(-1) * 0", "0"),
        ("-1 / 10000000", "0"),
    ],
)
def test_arithmetic(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("", "Use only"),
        (" ", "Not a valid"),
        ("1 +", "Not a valid"),
        ("1 2", "Not a valid"),
        ("()", "Use only"),
        ("1()", "Use only"),
        ("(1)(2)", "Use only"),
        ("007", "Not a valid"),
        ("1 / 0", "Division by zero"),
        ("1 / (2 - 2)", "Division by zero"),
        ("2 ** 3", "Use only"),
        ("7 // 2", "Use only"),
        ("10**10**10", "Use only"),
        ("1e9", "Use only"),
        ("1_000", "Use only"),
        ("1,000", "Use only"),
        ("x", "Use only"),
        ("True", "Use only"),
        ("().__class__", "Use only"),
        ("__import__('os')", "Use only"),
        ("1 if 1 else 2", "Use only"),
        ("'a' * 9", "Use only"),
        ("1\n+1", "Use only"),
        ("1\0", "Use only"),
        ("\ud800", "Use only"),
        ("\u0661 + 1", "Use only"),
        ("1000000 * 1000001", "Number too large"),
        ("9" * 100, "Number too large"),
        ("0." + "0" * 96 + "1/3", "Use at most 100"),
        ("(" * 50 + "1" + ")" * 49, "Not a valid"),
        ("-" * 99 + "1", "Too deeply nested"),
        ("1" + "+1" * 30, "Too deeply nested"),
        ("(" * 10**6 + "1" + ")" * 10**6, "Use at most 100"),
        ("1+" * 10**6 + "1", "Use at most 100"),
    ],
)
def test_all_else_is_refused(expression, complaint):
    with pytest.raises(ValueError, match=complaint):
        calculate(expression)
