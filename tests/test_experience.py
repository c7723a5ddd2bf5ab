"""From trajectories to the tensors that losses take."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.trainer.experience import Episode, episodes_of, tokens_of
from learner.trainer.intake_client import BatchShare
from learner.trainer.losses.estimators.gae import gae
from understudy.config import AlgorithmConfig
from understudy.trajectory import (
    Segment,
    Trajectory,
    TrajectoryError,
    Turn,
    VersionSpan,
    encode_trajectory,
)
from understudy.v1 import batch_pb2, common_pb2, trajectory_pb2

CPU = torch.device("cpu")
STEPS_BEHIND = {1: 0, 2: 1, 4: 3, 5: 4, 6: 5, 7: 4, 8: 6}
"""Of each version: the trainer went back by a step after version 6."""


def segment(num_sampled: int, version: int, num_prompt: int = 3) -> Segment:
    mask = np.arange(num_prompt + num_sampled) >= num_prompt
    return Segment(
        token_ids=np.arange(len(mask), dtype="i4"),
        loss_mask=mask,
        logprobs=-np.arange(1, num_sampled + 1, dtype="f4") / 10,
        version_spans=(VersionSpan(version=version, start=0, end=num_sampled),) * bool(num_sampled),
    )


def turn(segment: int, start: int, end: int, reward: float = 0.0) -> Turn:
    return Turn(
        segment=segment,
        start=start,
        end=end,
        reward=reward,
        num_tool_calls=0,
        malformed_call=False,
        generate_seconds=0.0,
        step_seconds=0.0,
    )


def message(
    segments: tuple[Segment, ...],
    turns: tuple[Turn, ...],
    place: tuple[int, int] = (0, 0),
    outcome: int = trajectory_pb2.OUTCOME_COMPLETED,
) -> batch_pb2.BatchTrajectory:
    payload = encode_trajectory(
        Trajectory(
            suite="made-up",
            split="train",
            task_ordinal=0,
            task_id="task",
            level=1,
            outcome=outcome,
            detail="",
            segments=segments,
            turns=turns,
            reward=sum(turn.reward for turn in turns),
            temperature=1.0,
            duration_seconds=1.0,
        )
    )
    record = trajectory_pb2.TrajectoryRecord(
        encoding=common_pb2.ENCODING_ZSTD,
        payload=payload,
        payload_digest=hashlib.sha256(payload).digest(),
    )
    return batch_pb2.BatchTrajectory(group_index=place[0], reward_index=place[1], record=record)


def share(*messages: batch_pb2.BatchTrajectory, rewards: list[list[float]]) -> BatchShare:
    groups = [batch_pb2.BatchGroup(rewards=np.array(r, "<f4").tobytes()) for r in rewards]
    header = batch_pb2.BatchHeader(step=5, groups=groups, steps_behind=STEPS_BEHIND)
    return BatchShare(header=header, trajectories=messages)


def centred(groups: list[np.ndarray]) -> list[np.ndarray]:
    return [rewards - rewards.mean() for rewards in groups]


def test_advantages_go_by_the_groups_of_the_whole_batch() -> None:
    one = message((segment(2, 1),), (turn(0, 0, 2),), place=(1, 0))
    [episode] = episodes_of(share(one, rewards=[[0, 1], [3, 1, 2]]), centred)
    assert episode.advantage == 1.0
    [episode] = episodes_of(share(one, rewards=[[0, 1], [3, 1, 2]]), None)
    assert episode.advantage == 0.0


def test_turns_go_on_over_segments() -> None:
    parts = (segment(5, 1), segment(0, 1), segment(4, 2))
    turns = (turn(0, 0, 2, 0.5), turn(0, 2, 5), turn(2, 0, 4, 0.25))
    [episode] = episodes_of(share(message(parts, turns), rewards=[[0.75]]), None)
    np.testing.assert_array_equal(episode.token_turns, [0, 0, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(episode.turn_rewards, [0.5, 0, 0.25])
    assert [sample.num_targets for sample in episode.samples] == [5, 4]
    assert episode.num_sampled == 9


def test_the_batchs_reward_counts_and_comes_at_the_end() -> None:
    turns = (turn(0, 0, 1, 0.5), turn(0, 1, 3, 0.5))
    [episode] = episodes_of(share(message((segment(3, 1),), turns), rewards=[[0.25]]), None)
    np.testing.assert_allclose(episode.turn_rewards, [0.5, -0.25])


def test_the_reward_can_come_at_the_end_as_a_whole() -> None:
    turns = (turn(0, 0, 1, 0.5), turn(0, 1, 3, 0.5))
    made = share(message((segment(3, 1),), turns), rewards=[[0.25]])
    [episode] = episodes_of(made, None, at_the_end=True)
    np.testing.assert_allclose(episode.turn_rewards, [0, 0.25])


def test_a_turn_without_a_token_hands_its_reward_on() -> None:
    turns = (turn(0, 0, 2), turn(0, 2, 2, 1.0))
    [episode] = episodes_of(share(message((segment(2, 1),), turns), rewards=[[1]]), None)
    np.testing.assert_array_equal(episode.token_turns, [0, 0])
    np.testing.assert_allclose(episode.turn_rewards, [1.0])


def test_an_episode_without_a_token_is_left_out() -> None:
    assert episodes_of(share(message((segment(0, 1),), ()), rewards=[[1]]), None) == []


def frozen(num_sampled: int, version: int = 99) -> Segment:
    """A record only, of a version that the batch does not know."""
    return replace(segment(num_sampled, version), part="searcher", frozen=True)


def test_turns_of_several_parts_alternate_in_time() -> None:
    # The first part replies, calls the second, which replies twice, and goes on in its segment.
    turns = (turn(0, 0, 2, 0.5), turn(1, 0, 3, 0.25), turn(1, 3, 4), turn(0, 2, 5, 1.0))
    made = share(message((segment(5, 1), segment(4, 2)), turns), rewards=[[1.75]])
    [episode] = episodes_of(made, None)
    np.testing.assert_array_equal(episode.token_turns, [0, 0, 3, 3, 3, 1, 1, 1, 2])
    np.testing.assert_allclose(episode.turn_rewards, [0.5, 0.25, 0, 1.0])
    assert episode.last_sample == 0
    tokens = tokens_of([episode, episode], "turn", CPU)
    assert tokens.step_N.tolist() == [0, 0, 3, 3, 3, 1, 1, 1, 2, 4, 4, 7, 7, 7, 5, 5, 5, 6]
    assert tokens.steps.first_K.tolist() == [0, 5, 8, 2, 9, 14, 17, 11]
    assert tokens.steps.episode_K.tolist() == [0] * 4 + [1] * 4
    assert tokens.steps.rewards_K.tolist() == [0.5, 0.25, 0, 1.0] * 2
    by_token = tokens_of([episode], "token", CPU)
    assert by_token.steps.first_K.tolist() == [0, 1, 5, 6, 7, 8, 2, 3, 4]
    assert by_token.step_N.tolist() == [0, 1, 6, 7, 8, 2, 3, 4, 5]
    assert by_token.steps.rewards_K.tolist() == [0, 0.5, 0, 0, 0.25, 0, 0, 0, 1.0]


def test_advantages_of_alternating_turns_are_those_of_their_time() -> None:
    turns = (turn(0, 0, 1), turn(1, 0, 2, 1.0), turn(0, 1, 3, 2.0))
    made = share(message((segment(3, 1), segment(2, 2)), turns), rewards=[[3.0]])
    tokens = tokens_of(episodes_of(made, None), "turn", CPU)
    values_N = torch.tensor([0.5, 0.25, 9.0, 1.0, 9.0])  # 9: no turn begins there
    targets = gae(
        log_ratios_K=torch.zeros(3),
        values_K=values_N[tokens.steps.first_K],
        end_values_E=torch.tensor([7.0]),  # the episode terminated: it counts nothing
        steps=tokens.steps,
        config=AlgorithmConfig(estimator="gae", gamma=0.5, trace_decay=0.5),
    )
    # By hand, in order of time with V = 0.5, 1, 0.25 and r = 0, 1, 2:
    # A2 = 2 - 0.25 = 1.75; A1 = 1 + 0.125 - 1 + A2 / 4 = 0.5625; A0 = 0.5 - 0.5 + A1 / 4
    torch.testing.assert_close(targets.advantages_K, torch.tensor([0.140625, 0.5625, 1.75]))
    advantages_N = targets.advantages_K[tokens.step_N]
    assert advantages_N.tolist() == [0.140625, 1.75, 1.75, 0.5625, 0.5625]


def test_a_frozen_part_earns_for_the_turn_that_called_it() -> None:
    # Its first turn comes before any that learns: that reward goes to the first one that does.
    turns = (turn(0, 0, 3, 0.25), turn(1, 0, 2), turn(0, 3, 4, 1.0), turn(1, 2, 3, 0.5))
    made = share(message((frozen(4), segment(3, 1)), turns), rewards=[[1.75]])
    [episode] = episodes_of(made, None)
    np.testing.assert_array_equal(episode.token_turns, [0, 0, 1])
    np.testing.assert_allclose(episode.turn_rewards, [1.25, 0.5])
    assert [sample.num_targets for sample in episode.samples] == [3]
    assert episode.samples[0].staleness.tolist() == [5, 5, 5]


def test_an_episode_of_frozen_segments_is_left_out_but_its_reward_counts() -> None:
    nothing = message((frozen(4),), (turn(0, 0, 4, 3.0),), place=(0, 0))
    learned = message((segment(2, 1),), (turn(0, 0, 2, 1.0),), place=(0, 1))
    [episode] = episodes_of(share(nothing, learned, rewards=[[3, 1]]), centred)
    assert (episode.num_sampled, episode.advantage) == (2, -1.0)


def test_tokens_in_no_turn_belong_to_the_turn_before() -> None:
    turns = (turn(0, 1, 2), turn(1, 1, 2))
    made = share(message((segment(3, 1), segment(3, 2)), turns), rewards=[[0]])
    [episode] = episodes_of(made, None)
    np.testing.assert_array_equal(episode.token_turns, [0, 0, 0, 0, 1, 1])
    [bare] = episodes_of(share(message((segment(3, 1),), ()), rewards=[[2]]), None)
    np.testing.assert_array_equal(bare.token_turns, [0, 0, 0])
    np.testing.assert_allclose(bare.turn_rewards, [2])


def test_only_a_cut_short_episode_is_truncated() -> None:
    made = [
        message((segment(1, 1),), (turn(0, 0, 1),), place=(0, index), outcome=outcome)
        for index, outcome in enumerate(
            (trajectory_pb2.OUTCOME_COMPLETED, trajectory_pb2.OUTCOME_TRUNCATED)
        )
    ]
    episodes = episodes_of(share(*made, rewards=[[0, 1]]), None)
    assert [episode.truncated for episode in episodes] == [False, True]


@pytest.fixture
def two() -> list[Episode]:
    """Turns of 2, 3 and 3, 1 tokens; the second episode was played by versions 4 and 6."""
    first = message((segment(5, 5),), (turn(0, 0, 2), turn(0, 2, 5, 1.0)))
    second = message(
        (segment(3, 4), segment(1, 6)), (turn(0, 0, 3, 0.5), turn(1, 0, 1)), place=(0, 1)
    )
    return episodes_of(share(first, second, rewards=[[1.0, 0.5]]), None)


def test_a_token_is_as_old_as_the_steps_since_not_the_versions() -> None:
    made = tuple(segment(1, version) for version in (5, 6, 7, 8))
    turns = tuple(turn(index, 0, 1) for index in range(4))
    tokens = tokens_of(episodes_of(share(message(made, turns), rewards=[[1]]), None), "turn", CPU)
    assert tokens.staleness_N.tolist() == [1, 0, 1, 1]  # the last one by weights that are ahead


def test_a_version_that_the_batch_does_not_know_is_named() -> None:
    with pytest.raises(TrajectoryError, match="version 9 is none of the batch's"):
        episodes_of(share(message((segment(1, 9),), (turn(0, 0, 1),)), rewards=[[1]]), None)


def test_tokens_know_their_turn_and_episode(two: list[Episode]) -> None:
    tokens = tokens_of(two, "turn", CPU)
    assert tokens.step_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert tokens.episode_N.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert tokens.staleness_N.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0]
    assert tokens.steps.first_K.tolist() == [0, 2, 5, 8]
    assert tokens.steps.episode_K.tolist() == [0, 0, 1, 1]
    assert tokens.steps.rewards_K.tolist() == [0, 1, 0.5, 0]
    torch.testing.assert_close(
        tokens.behaviour_logprobs_N,
        torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.1, -0.2, -0.3, -0.1]),
    )


def test_a_tokens_step_gets_a_turns_reward_at_its_end(two: list[Episode]) -> None:
    tokens = tokens_of(two, "token", CPU)
    assert tokens.step_N.tolist() == list(range(9))
    assert tokens.steps.first_K.tolist() == list(range(9))
    assert tokens.steps.episode_K.tolist() == tokens.episode_N.tolist()
    assert tokens.steps.rewards_K.tolist() == [0, 0, 0, 0, 1, 0, 0, 0.5, 0]


@pytest.mark.parametrize("step", ["turn", "token"])
def test_no_episodes_are_no_tokens(step: str) -> None:
    tokens = tokens_of([], step, CPU)
    assert (tokens.num_tokens, tokens.num_steps, tokens.num_episodes) == (0, 0, 0)
