"""Tasks: (split, ordinal) -> Task, a pure function, in GAIA's record format.

Level 1 takes one tool call. Level 2 takes two or three: a chain, or two one-call chains and a
sum. Level 3 takes four to six: a sum of two chains, of which one at least is longer.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from random import Random

from envserver.suites.practice.attachment import Attachment, make_attachment
from envserver.suites.practice.chains import Chain, cell_chain, named_chain, searched_chain
from envserver.suites.practice.world import NUMBER, PERSON, World, make_world

SPLITS = {"train": 1_000_000, "test": 3_000}
LEVELS = (1, 2, 3)
CALLS_BY_LEVEL = {1: (1, 1), 2: (2, 3), 3: (4, 6)}
"""Level -> fewest and most tool calls that its tasks take."""

_SEED = "practice/1"
_PARITY = {"train": 0, "test": 1}
_OPENINGS = ("What is {}?", "Find {}.", "Tell me {}.")
_OPERATORS = {"plus": "+", "minus": "-"}
_LENGTHS_3 = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2), (2, 3))
_WEIGHTS_3 = (3, 3, 2, 1, 1, 1, 1)
"""Calls of the two chains of a level 3 task, and how often each pair comes."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem, with all that its environment needs."""

    task_id: str
    question: str
    level: int
    answer: str
    world: World
    attachment: Attachment | None
    chains: tuple[Chain, ...]
    """One chain, or the two whose results are combined."""
    operator: str | None
    """`+` or `-` between two chains."""

    def record(self) -> dict[str, str | int]:
        """The task as a row of GAIA's metadata."""
        return {
            "task_id": self.task_id,
            "Question": self.question,
            "Level": self.level,
            "Final answer": self.answer,
            "file_name": self.attachment.file_name if self.attachment else "",
        }

    def num_calls(self) -> int:
        """Tool calls that the task takes."""
        return sum(len(chain.calls) for chain in self.chains) + (self.operator is not None)


def level_of(ordinal: int) -> int:
    """The level of a task; levels take turns."""
    return LEVELS[ordinal % len(LEVELS)]


def make_task(split: str, ordinal: int) -> Task:
    """The task of an ordinal. Raises KeyError for a split or ordinal that does not exist."""
    if not 0 <= ordinal < SPLITS[split]:
        raise KeyError(f"{split} has tasks 0 to {SPLITS[split] - 1}, not {ordinal}")
    rng = Random(f"{_SEED}/{split}/{ordinal}")
    world, attachment = make_world(rng, _PARITY[split]), make_attachment(rng)
    level = level_of(ordinal)
    chains, word = _compose(rng, world, attachment, level)
    phrase = f" {word} ".join(chain.phrase for chain in chains)
    return Task(
        task_id=f"practice-{split}-{level}-{ordinal}",
        question=_opening(rng, chains).format(phrase),
        level=level,
        answer=_answer(chains, word),
        world=world,
        attachment=attachment if attachment.file_name in phrase else None,
        chains=chains,
        operator=_OPERATORS.get(word),
    )


@cache
def digest() -> str:
    """A digest of the first tasks of every split: it changes when the generator does."""
    tasks = [make_task(split, ordinal) for split in SPLITS for ordinal in range(48)]
    return hashlib.sha256(repr((SPLITS, tasks)).encode()).hexdigest()[:16]


def _compose(
    rng: Random, world: World, attachment: Attachment, level: int
) -> tuple[tuple[Chain, ...], str]:
    """The chains of a task, and `plus`, `minus` or nothing between them."""
    if level == 1:
        return (_draw_chain(rng, world, attachment, 1, to_number=False),), ""
    if level == 2 and rng.random() < 0.65:
        num_calls = 2 if rng.random() < 0.65 else 3
        return (_draw_chain(rng, world, attachment, num_calls, to_number=False),), ""
    lengths = (1, 1) if level == 2 else rng.choices(_LENGTHS_3, _WEIGHTS_3)[0]
    left, right = (_draw_chain(rng, world, attachment, n, to_number=True) for n in lengths)
    while right.phrase == left.phrase:
        right = _draw_chain(rng, world, attachment, lengths[1], to_number=True)
    if rng.random() < 0.5:
        return (left, right), "plus"
    return ((left, right) if int(left.result) >= int(right.result) else (right, left)), "minus"


def _draw_chain(
    rng: Random, world: World, attachment: Attachment, num_calls: int, *, to_number: bool
) -> Chain:
    kind = rng.random()
    if num_calls == 1 and kind < 0.3:
        return cell_chain(rng, attachment)
    if kind > 0.75 and not (num_calls == 1 and to_number):
        return searched_chain(rng, world, num_calls, to_number=to_number)
    return named_chain(rng, world, num_calls, to_number=to_number)


def _opening(rng: Random, chains: tuple[Chain, ...]) -> str:
    opening = rng.choice(_OPENINGS)
    if chains[0].kind == PERSON and opening.startswith("What"):
        return "Who is {}?"
    return opening


def _answer(chains: tuple[Chain, ...], word: str) -> str:
    if not word:
        return chains[0].result
    assert all(chain.kind == NUMBER for chain in chains)
    left, right = (int(chain.result) for chain in chains)
    return str(left + right if word == "plus" else left - right)
