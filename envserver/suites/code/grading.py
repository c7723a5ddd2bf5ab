"""Grades an answer: its code runs in a box of its own, what comes out is compared out here.

The box is given the code and the inputs of the hidden tests, never what they should return, and the
grader takes nothing from it but plain JSON. Code that gets hold of the worker, or of the pipe, can
therefore say what it likes and still has to know the right values.
"""

import re
from collections.abc import Sequence
from typing import Any

from envserver.sandbox import Outcome, Pool
from envserver.suites.code.tasks import Task

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def code_of(text: str) -> str:
    """The code in an answer: its last fenced block, or all of it if it has none."""
    blocks: list[str] = _FENCE.findall(text)
    return blocks[-1] if blocks else text


async def grade(pool: Pool, task: Task, text: str) -> tuple[bool, Outcome]:
    """Whether the answer passes all hidden tests, and how running them ended.

    Raises OSError if no box can be had.
    """
    box = await pool.take()
    try:
        reply = await box.call(
            "functions", code=code_of(text), function="solve", arguments=task.inputs
        )
    finally:
        await pool.discard(box)
    return passes(reply.value, task.expected), reply.outcome


def passes(results: Any, expected: Sequence[Any]) -> bool:
    """Whether what a box says of its calls is what was expected of every one of them."""
    return same(results, [{"value": value} for value in expected])


def same(value: Any, expected: Any) -> bool:
    """Whether two plain JSON values are equal, and of equal types: True is not 1, nor 1.0."""
    if type(value) is not type(expected):
        return False
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            same(value[key], expected[key]) for key in expected
        )
    return bool(value == expected)
