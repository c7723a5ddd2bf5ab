"""Made-up tokens for the tests of losses, and the episodes they belong to as plain lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.trainer.losses.tokens import Steps, Tokens
from understudy.config import AlgorithmConfig

LENGTHS = [[3, 1, 4], [2], [5, 2], [1]]
"""Tokens of each turn of each episode: 18 tokens, 7 turns, 4 episodes."""


def config(**fields: object) -> AlgorithmConfig:
    """An algorithm's config; the fields that are not named are DAPO's."""
    return AlgorithmConfig.model_validate(fields)


def tokens(
    lengths: Sequence[Sequence[int]] = LENGTHS,
    *,
    step: str = "turn",
    behaviour: Tensor | None = None,
    staleness: Sequence[float] | None = None,
    rewards: Sequence[float] | None = None,
    truncated: Sequence[bool] | None = None,
) -> Tokens:
    """Tokens of episodes that have turns of these lengths; what is not given is 0.

    Args:
        lengths: tokens of each turn of each episode.
        step: "turn" or "token"; rewards are of these.
    """
    turns = [(e, n) for e, episode in enumerate(lengths) for n in episode]
    sizes = turns if step == "turn" else [(e, 1) for e, n in turns for _ in range(n)]
    step_N = [k for k, (_, n) in enumerate(sizes) for _ in range(n)]
    zeros_N = torch.zeros(len(step_N), dtype=torch.float64)
    return Tokens(
        behaviour_logprobs_N=zeros_N if behaviour is None else behaviour,
        staleness_N=zeros_N if staleness is None else float64(staleness),
        step_N=torch.tensor(step_N, dtype=torch.int64),
        episode_N=torch.tensor([e for e, n in sizes for _ in range(n)], dtype=torch.int64),
        steps=Steps(
            first_K=torch.tensor(
                [n for n, k in enumerate(step_N) if n == 0 or step_N[n - 1] != k], dtype=torch.int64
            ),
            episode_K=torch.tensor([e for e, _ in sizes], dtype=torch.int64),
            rewards_K=float64([0.0] * len(sizes) if rewards is None else rewards),
            truncated_E=torch.tensor(
                [False] * len(lengths) if truncated is None else truncated, dtype=torch.bool
            ),
        ),
    )


def float64(values: Sequence[float]) -> Tensor:
    """A tensor for exact comparison."""
    return torch.tensor(values, dtype=torch.float64)


def normal(num: int, scale: float, seed: int) -> Tensor:
    """[num] float64, around 0."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, dtype=torch.float64, generator=generator)


def members(index: Tensor, num: int) -> list[list[int]]:
    """Places that have each of num indices."""
    places: list[list[int]] = [[] for _ in range(num)]
    for n, i in enumerate(index.tolist()):
        places[i].append(n)
    return places
