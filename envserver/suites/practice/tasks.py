"""Tasks: (split, ordinal) -> Task, a pure function, in GAIA's record format.

Level 1 takes one tool call. Level 2 takes two or three: a chain, or two one-call chains and a
sum. Level 3 takes four to six: a sum of two chains, of which one at least is longer.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from random import Random

from envserver.suites.practice.attachment import Attachment, make_attachment
from envserver.suites.practice.chains import Chain, Chains
from envserver.suites.practice.domain import NUMBER, Domain
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.world import World, make_world

SPLITS = PEOPLE.splits
LEVELS = (1, 2, 3)
CALLS_BY_LEVEL = {1: (1, 1), 2: (2, 3), 3: (4, 6)}
"""Level -> fewest and most tool calls that its tasks take."""

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

    def tool_names(self, domain: Domain = PEOPLE) -> list[str]:
        """Names of the tools that the task takes, each once, sorted."""
        names = {call.name for chain in self.chains for call in chain.calls}
        return sorted(names | ({domain.calculate("0", "+", "0").name} if self.operator else set()))


def level_of(ordinal: int) -> int:
    """The level of a task; levels take turns."""
    return LEVELS[ordinal % len(LEVELS)]


def make_task(split: str, ordinal: int, domain: Domain = PEOPLE) -> Task:
    """The task of an ordinal. Raises KeyError for a split or ordinal that does not exist."""
    if not 0 <= ordinal < domain.splits[split]:
        raise KeyError(f"{split} has tasks 0 to {domain.splits[split] - 1}, not {ordinal}")
    rng = Random(f"{domain.version}/{split}/{ordinal}")
    world = make_world(rng, domain, domain.parity[split])
    attachment = make_attachment(rng, domain)
    level = level_of(ordinal)
    chains, word = _compose(rng, domain, Chains(rng, domain, world, attachment), level)
    phrase = f" {word} ".join(chain.phrase for chain in chains)
    openings = domain.openings_of.get(chains[0].kind, domain.openings)
    return Task(
        task_id=f"{domain.name}-{split}-{level}-{ordinal}",
        question=rng.choice(openings).format(phrase),
        level=level,
        answer=_answer(chains, domain.operators.get(word)),
        world=world,
        attachment=attachment if attachment.file_name in phrase else None,
        chains=chains,
        operator=domain.operators.get(word),
    )


@cache
def digest() -> str:
    """A digest of the first tasks of every split: it changes when the generator does."""
    return digest_of(PEOPLE)


def digest_of(domain: Domain) -> str:
    """A digest of the first tasks of every split of a domain."""
    tasks = [make_task(split, ordinal, domain) for split in domain.splits for ordinal in range(48)]
    return hashlib.sha256(repr((domain.splits, tasks)).encode()).hexdigest()[:16]


def _compose(
    rng: Random, domain: Domain, chains: Chains, level: int
) -> tuple[tuple[Chain, ...], str]:
    """The chains of a task, and the operator's word or nothing between them."""
    if level == 1:
        return (chains.draw(1, to_number=False),), ""
    if level == 2 and rng.random() < 0.65:
        num_calls = 2 if rng.random() < 0.65 else 3
        return (chains.draw(num_calls, to_number=False),), ""
    lengths = (1, 1) if level == 2 else rng.choices(_LENGTHS_3, _WEIGHTS_3)[0]
    left, right = (chains.draw(n, to_number=True) for n in lengths)
    while right.phrase == left.phrase:
        right = chains.draw(lengths[1], to_number=True)
    plus, minus = domain.operators
    if rng.random() < 0.5:
        return (left, right), plus
    return ((left, right) if int(left.result) >= int(right.result) else (right, left)), minus


def _answer(chains: tuple[Chain, ...], operator: str | None) -> str:
    if operator is None:
        return chains[0].result
    assert all(chain.kind == NUMBER for chain in chains)
    left, right = (int(chain.result) for chain in chains)
    return str(left + right if operator == "+" else left - right)
