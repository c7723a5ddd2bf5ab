"""What evaluations have in common, those within a run and those of `understudy eval`."""

import math
import re
from collections.abc import Sequence

_FINAL_ANSWER = re.compile("FINAL ANSWER:", re.IGNORECASE)


def final_answer(text: object) -> str:
    """The answer in a policy's last reply: what follows the last `FINAL ANSWER:`, or all of it.

    What is no text holds no answer.
    """
    if not isinstance(text, str):
        return ""
    return _FINAL_ANSWER.split(text)[-1].strip()


def episode_seed(seed: int, task_ordinal: int) -> int:
    """Seed of the episode of a held-out task: the same for every policy that plays it, so that
    figures of two policies can be compared."""
    return (seed * 1_000_003 + task_ordinal) % 2**63


def interval_of(rewards: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean reward: Wilson's where rewards are shares of a success,
    from 0 to 1; else that of the normal distribution."""
    number = len(rewards)
    if all(0 <= reward <= 1 for reward in rewards):
        return wilson_interval(math.fsum(rewards), number)
    mean = math.fsum(rewards) / number
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(number - 1, 1)
    half = 1.96 * math.sqrt(variance / number)
    return (mean - half, mean + half)


def wilson_interval(successes: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927, JASA 22: 209-212)."""
    if not number:
        return (0.0, 1.0)
    share = successes / number
    denominator = 1 + z * z / number
    centre = (share + z * z / (2 * number)) / denominator
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2)) / denominator
    return (max(centre - half, 0.0), min(centre + half, 1.0))
