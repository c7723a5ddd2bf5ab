"""Tasks: (split, ordinal) -> Task, a pure function.

Level 1 is a result alone, or a single step; level 2 a step and a result; level 3 three steps and a
result. A task's instructions belong to one split for ever, by their digest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from envserver.suites.code.steps import DOMAINS, NUMBERS, Domain, Part

SPLITS = {"train": 100_000, "test": 600}
LEVELS = (1, 2, 3)
NUM_EXAMPLES = 2
NUM_TESTS = 12
"""Hidden inputs, the empty list among them; none is an example."""

_SEED = "code/1"
_LETTERS = "aabcdeeefghiilmnoopqrstuuvwyz"
_WHOLE = Part("Return the list.", "x")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem, with its hidden tests."""

    task_id: str
    level: int
    prompt: str
    solution: str
    """Python that solves it, for demonstrations and tests."""
    inputs: Sequence[list[Any]]
    """Arguments of each hidden call."""
    expected: Sequence[Any]
    """What each must return, as plain JSON."""


def make_task(split: str, ordinal: int) -> Task:
    """The task of an ordinal. Raises KeyError for a split or ordinal that does not exist."""
    if not 0 <= ordinal < SPLITS[split]:
        raise KeyError(f"{split} has tasks 0 to {SPLITS[split] - 1}, not {ordinal}")
    rng = Random(f"{_SEED}/{split}/{ordinal}")
    level = LEVELS[ordinal % len(LEVELS)]
    while True:
        domain, parts = _draw(rng, level)
        lists = _lists(rng, domain, NUM_EXAMPLES + NUM_TESTS - 1)
        examples, hidden = lists[:NUM_EXAMPLES], [[], *lists[NUM_EXAMPLES:]]
        expected = [_run(parts, values) for values in hidden]
        if _split_of(parts) == split and _is_varied(expected):
            break
    return Task(
        task_id=f"code-{split}-{level}-{ordinal}",
        level=level,
        prompt=_prompt(domain, parts, examples),
        solution=_solution(domain, parts),
        inputs=[[values] for values in hidden],
        expected=expected,
    )


@cache
def digest() -> str:
    """A digest of the first tasks of every split: it changes when the generator does."""
    tasks = [make_task(split, ordinal) for split in SPLITS for ordinal in range(60)]
    return hashlib.sha256(repr((SPLITS, tasks)).encode()).hexdigest()[:16]


def _draw(rng: Random, level: int) -> tuple[Domain, tuple[Part, ...]]:
    domain = rng.choice(DOMAINS)
    if level == 1 and rng.random() < 0.5:
        return domain, (_pick(rng, domain.steps), _WHOLE)
    steps = rng.sample(domain.steps, {1: 0, 2: 1, 3: 3}[level])
    filled = [_fill(rng, step) for step in steps]
    return domain, (*filled, _pick(rng, domain.results))


def _pick(rng: Random, parts: Sequence[Part]) -> Part:
    return _fill(rng, rng.choice(parts))


def _fill(rng: Random, part: Part) -> Part:
    return part.fill(rng.randint(part.low, part.high))


def _is_varied(expected: Sequence[Any]) -> bool:
    """Whether no one value, returned always, would be right in more than half of the tests."""
    return all(2 * expected.count(value) <= len(expected) for value in expected)


def _split_of(parts: Sequence[Part]) -> str:
    """A sixth of all tasks that can be put into words belong to the test split."""
    text = "\n".join(part.text for part in parts)
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 6 == 0 else "train"


def _lists(rng: Random, domain: Domain, num: int) -> list[list[Any]]:
    """Lists that differ from each other, with repetitions in many of them."""
    lists: list[list[Any]] = []
    while len(lists) < num:
        length = rng.randint(4, 9) if len(lists) < num - 2 else rng.randint(1, 3)
        values = [_value(rng, domain) for _ in range(length)]
        if rng.random() < 0.6:
            values += rng.choices(values, k=2)
        if values not in lists:
            lists.append(values)
    return lists


def _value(rng: Random, domain: Domain) -> int | str:
    if domain is NUMBERS:
        return rng.randint(-12, 30)
    return "".join(rng.choices(_LETTERS, k=rng.randint(2, 8)))


def _run(parts: Sequence[Part], values: list[Any]) -> Any:
    for part in parts:
        values = _function(part.code)(values)
    return values


@cache
def _function(code: str) -> Any:
    return eval(f"lambda x: {code}")  # of steps.py, never of anybody else


def _solution(domain: Domain, parts: Sequence[Part]) -> str:
    lines = [f"def solve({domain.argument}):", f"    x = {domain.argument}"]
    lines += [f"    x = {part.code}" for part in parts[:-1]]
    return "\n".join([*lines, f"    return {parts[-1].code}"])


def _prompt(domain: Domain, parts: Sequence[Part], examples: Sequence[list[Any]]) -> str:
    steps = "\n".join(f"{number}. {part.text}" for number, part in enumerate(parts, 1))
    shown = "\n".join(f"solve({values!r}) == {_run(parts, values)!r}" for values in examples)
    return (
        f"Write a Python function `solve({domain.argument})`. It takes {domain.kind} and does "
        f"this, in order:\n{steps}\nFor example:\n{shown}"
    )
