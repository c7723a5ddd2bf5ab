"""One episode: reset, then reply and step until it is done or at a limit.

    lease -> session.reset -> [speaker.reply -> session.step]* -> Episode -> Trajectory
                           or session.follow, while the environment calls the recording endpoint

A failed episode is data: it ends with an outcome, attributed once to the boundary it crossed.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from actor.environment_pool import EnvironmentFailedError, EnvironmentPool, describe_failure
from actor.policy import CutShortError, InferenceFailedError, NoReplyError, Policy, Said, Speaker
from actor.recording.recorder import Recorder
from actor.recording.session import RecordingSession
from actor.tokens import Sampled
from understudy import metrics
from understudy.client import Lease, Observation, Opening, Session
from understudy.trajectory import Trajectory, Turn
from understudy.v1 import trajectory_pb2

if TYPE_CHECKING:
    pass

COMPLETED = trajectory_pb2.OUTCOME_COMPLETED
TRUNCATED = trajectory_pb2.OUTCOME_TRUNCATED
ENVIRONMENT_FAILED = trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED
INFERENCE_FAILED = trajectory_pb2.OUTCOME_INFERENCE_FAILED
ACTOR_FAILED = trajectory_pb2.OUTCOME_ACTOR_FAILED

S = TypeVar("S", bound=Speaker)


@dataclass
class Episode(Generic[S]):
    """What is known of an episode, while it is played and when it has ended."""

    start: float = field(default_factory=time.monotonic)
    opening: Opening | None = None
    speaker: S | Recorder | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    """All that was said, as chat messages."""
    answer: str = ""
    """Text of the last reply."""
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    outcome: "trajectory_pb2.Outcome.ValueType" = COMPLETED
    detail: str = ""
    seconds: float = 0.0


async def play_episode(
    policy: Policy[S], environments: EnvironmentPool, lease: Lease
) -> Episode[S]:
    """Play one episode to its end. Never raises but for cancellation."""
    episode: Episode[S] = Episode()
    try:
        await _play(policy, environments, lease, episode)
    except CutShortError as error:
        episode.outcome, episode.detail = TRUNCATED, str(error)
    except EnvironmentFailedError as error:
        episode.outcome, episode.detail = ENVIRONMENT_FAILED, str(error)
    except InferenceFailedError as error:
        episode.outcome, episode.detail = INFERENCE_FAILED, str(error)
    except Exception as error:  # a fault of the actor is data too; group accounting must close
        episode.outcome, episode.detail = ACTOR_FAILED, repr(error)
    metrics.TURNS.inc(len(episode.turns))
    episode.seconds = time.monotonic() - episode.start
    return episode


async def _play(
    policy: Policy[S], environments: EnvironmentPool, lease: Lease, episode: Episode[S]
) -> None:
    task = (lease.suite, lease.split, lease.task_ordinal)
    async with contextlib.AsyncExitStack() as stack:
        recording = stack.enter_context(policy.record(lease))
        endpoint = recording.url if recording else ""
        session, opening = await stack.enter_async_context(
            environments.episode(*task, endpoint=endpoint)
        )
        episode.opening = opening
        if recording and opening.driven:
            return await _follow(episode, recording, session)
        if recording:
            recording.close()  # nobody else has a use for it
        episode.speaker = policy.begin(lease, opening)
        messages = opening.messages
        for _ in range(lease.max_turns):
            observation = await _turn(episode, episode.speaker, session, messages)
            if observation.terminated:
                return
            if observation.truncated:
                raise CutShortError("the environment cut the episode short")
            messages = observation.messages
        raise CutShortError(f"max_turns = {lease.max_turns}")


async def _follow(episode: Episode[S], recording: RecordingSession, session: Session) -> None:
    """Wait for an environment that leads the conversation, and take over what was recorded."""
    recorder = episode.speaker = recording.recorder
    try:
        observation = await recording.accompany(_finish(recording, session))
        episode.reward = observation.reward
    finally:
        recording.close()
        episode.turns = recorder.turns(episode.reward)
        episode.messages = [dict(message) for message in recorder.messages]
        episode.answer = recorder.answer
    if recording.cut_short:
        raise CutShortError(recording.cut_short)
    if not episode.turns:
        raise EnvironmentFailedError("the environment ended without a reply of the policy's")
    if observation.truncated:
        raise CutShortError("the environment cut the episode short")


async def _finish(recording: RecordingSession, session: Session) -> Observation:
    try:
        return await session.follow()
    except (grpc.aio.AioRpcError, TimeoutError) as error:
        if recording.cut_short:  # what a harness does when it is refused a reply is no fault of its
            raise CutShortError(recording.cut_short) from None
        raise EnvironmentFailedError(describe_failure(error)) from None


async def _turn(
    episode: Episode[S], speaker: S, session: Session, messages: Sequence[dict[str, Any]]
) -> Observation:
    start = time.monotonic()
    try:
        said = await speaker.reply(messages)
    except NoReplyError as error:
        episode.messages += [] if error.before else messages
        _take_inner(episode, error.before)
        raise
    generated = time.monotonic()
    start += sum(inner.seconds for inner in said.before)
    _take_inner(episode, said.before)
    episode.messages += [*(said.heard or messages), said.message]
    episode.answer = said.reply.text
    observation = Observation(messages=[], reward=0.0, terminated=False, truncated=False)
    try:
        observation = await _answer(said, session)
    finally:
        episode.reward += observation.reward
        seconds = generated - start, time.monotonic() - generated
        episode.turns.append(_turn_of(said, observation.reward, *seconds))
    return observation


def _take_inner(episode: Episode[S], replies: Sequence[Said]) -> None:
    for said in replies:
        episode.messages += [*said.heard, said.message]
        episode.turns.append(_turn_of(said, 0.0, said.seconds, 0.0))


def _turn_of(said: Said, reward: float, generate_seconds: float, step_seconds: float) -> Turn:
    return Turn(
        segment=said.segment,
        start=said.start,
        end=said.end,
        reward=reward,
        num_tool_calls=len(said.reply.calls),
        malformed_call=bool(said.reply.malformed),
        generate_seconds=generate_seconds,
        step_seconds=step_seconds,
    )


async def _answer(said: Said, session: Session) -> Observation:
    if said.cut_off:
        raise CutShortError("a reply was cut off at its token limit")
    if said.reply.malformed:
        return _tell_malformed(said.reply.malformed)
    calls = [(call.name, call.arguments) for call in said.reply.calls]
    try:
        return await session.step(calls, said.reply.text)
    except (grpc.aio.AioRpcError, TimeoutError) as error:
        raise EnvironmentFailedError(describe_failure(error)) from None


def _tell_malformed(what: str) -> Observation:
    metrics.MALFORMED_CALLS.inc()
    message = {"role": "tool", "content": f"Malformed call: {what}."}
    return Observation(messages=[message], reward=0.0, terminated=False, truncated=False)


class Player:
    """Plays leased episodes with the run's inference; holds nothing that outlives one."""

    def __init__(self, policy: Policy[Speaker], environments: EnvironmentPool) -> None:
        """Take a policy in tokens, and the run's environments."""
        self._policy = policy
        self._environments = environments

    async def play(self, lease: Lease) -> Trajectory:
        """Play one episode to its end. Never raises but for cancellation."""
        return _trajectory(lease, await play_episode(self._policy, self._environments, lease))


def _trajectory(lease: Lease, episode: Episode[Speaker]) -> Trajectory:
    speaker = episode.speaker
    return Trajectory(
        suite=lease.suite,
        split=lease.split,
        task_ordinal=lease.task_ordinal,
        task_id=episode.opening.task_id if episode.opening else "",
        level=episode.opening.level if episode.opening else 0,
        outcome=episode.outcome,
        detail=episode.detail,
        segments=speaker.segments() if isinstance(speaker, Sampled) else (),
        turns=tuple(episode.turns),
        reward=episode.reward,
        temperature=lease.sampling.temperature,
        duration_seconds=episode.seconds,
    )
