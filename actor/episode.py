"""One episode: reset, then generate and step until it is done or at a limit.

    lease -> session.reset -> [observe -> generate -> parse -> session.step]* -> Trajectory

A failed episode is data: it ends with an outcome, attributed once to the boundary it crossed.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from actor.conversation import Conversation
from actor.environment_pool import EnvironmentFailedError, EnvironmentPool, describe_failure
from actor.inference_pool import InferenceFailedError, InferencePool
from understudy import metrics
from understudy.chat import ChatFormat, parse_reply
from understudy.client import Generation, Lease, Observation, Opening, Session
from understudy.trajectory import Trajectory, Turn
from understudy.v1 import common_pb2, trajectory_pb2

COMPLETED = trajectory_pb2.OUTCOME_COMPLETED
TRUNCATED = trajectory_pb2.OUTCOME_TRUNCATED
_CHARACTERS_PER_TOKEN = 100
"""More than any text has, on average; tokenisers get about 4."""


class _CutShortError(Exception):
    """A limit ended the episode."""


@dataclass
class _Record:
    """What is known of an episode while it is played."""

    start: float = field(default_factory=time.monotonic)
    opening: Opening | None = None
    conversation: Conversation | None = None
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0


class Player:
    """Plays leased episodes; holds nothing that outlives one."""

    def __init__(
        self, chat: ChatFormat, inference: InferencePool, environments: EnvironmentPool
    ) -> None:
        self._chat = chat
        self._inference = inference
        self._environments = environments

    async def play(self, lease: Lease) -> Trajectory:
        """Play one episode to its end. Never raises but for cancellation."""
        record = _Record()
        outcome, detail = COMPLETED, ""
        try:
            await self._play(lease, record)
        except _CutShortError as error:
            outcome, detail = TRUNCATED, str(error)
        except EnvironmentFailedError as error:
            outcome, detail = trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED, str(error)
        except InferenceFailedError as error:
            outcome, detail = trajectory_pb2.OUTCOME_INFERENCE_FAILED, str(error)
        except Exception as error:  # a fault of the actor is data too; group accounting must close
            outcome, detail = trajectory_pb2.OUTCOME_ACTOR_FAILED, repr(error)
        return _finish(lease, record, outcome, detail)

    async def _play(self, lease: Lease, record: _Record) -> None:
        task = (lease.suite, lease.split, lease.task_ordinal)
        async with self._environments.episode(*task) as (session, opening):
            record.opening = opening
            record.conversation = Conversation(self._chat, opening.tools)
            messages = opening.messages
            for _ in range(lease.max_turns):
                observation = await self._turn(lease, record, session, messages)
                if observation.terminated:
                    return
                if observation.truncated:
                    raise _CutShortError("the environment cut the episode short")
                messages = observation.messages
            raise _CutShortError(f"max_turns = {lease.max_turns}")

    async def _turn(
        self, lease: Lease, record: _Record, session: Session, messages: list[dict[str, Any]]
    ) -> Observation:
        conversation = record.conversation
        assert conversation is not None
        start = time.monotonic()
        _refuse_flood(messages, lease.max_tokens)
        generation = await self._generate(lease, conversation.observe(messages), len(record.turns))
        generated = time.monotonic()
        first = conversation.num_sampled
        reply = parse_reply(conversation.reply(generation))
        observation = Observation(messages=[], reward=0.0, terminated=False, truncated=False)
        try:
            if generation.cut_off:
                raise _CutShortError("a reply was cut off at its token limit")
            if reply.malformed:
                observation = _tell_malformed(reply.malformed)
            else:
                calls = [(call.name, call.arguments) for call in reply.calls]
                observation = await _step(session, calls, reply.text)
        finally:
            record.reward += observation.reward
            record.turns.append(
                Turn(
                    segment=conversation.segment_index,
                    start=first,
                    end=conversation.num_sampled,
                    reward=observation.reward,
                    num_tool_calls=len(reply.calls),
                    malformed_call=bool(reply.malformed),
                    generate_seconds=generated - start,
                    step_seconds=time.monotonic() - generated,
                )
            )
        return observation

    async def _generate(self, lease: Lease, prompt: np.ndarray, turn: int) -> Generation:
        room = lease.max_tokens - len(prompt)
        if room < 1:
            raise _CutShortError(f"max_tokens = {lease.max_tokens}")
        sampling = common_pb2.SamplingParameters(
            temperature=lease.sampling.temperature,
            max_new_tokens=min(room, lease.sampling.max_new_tokens),
            stop_token_ids=self._chat.stop_token_ids,
        )
        if lease.sampling.HasField("seed"):
            # One stream of random numbers a turn, told apart by a large odd stride.
            sampling.seed = (lease.sampling.seed + turn * 0x9E3779B97F4A7C15) % 2**63
        key = f"{lease.ordinal}-{lease.sample_index}"
        return await self._inference.generate(prompt, sampling, key, lease.min_version)


def _refuse_flood(messages: list[dict[str, Any]], max_tokens: int) -> None:
    """Tokenising blocks the event loop: what cannot fit into the segment is not tokenised."""
    size = sum(len(message["content"]) for message in messages)
    if size > _CHARACTERS_PER_TOKEN * max_tokens:
        raise _CutShortError(f"max_tokens = {max_tokens}: an observation has {size} characters")


async def _step(session: Session, calls: list[tuple[str, Any]], text: str) -> Observation:
    try:
        return await session.step(calls, text)
    except (grpc.aio.AioRpcError, TimeoutError) as error:
        raise EnvironmentFailedError(describe_failure(error)) from None


def _tell_malformed(what: str) -> Observation:
    metrics.MALFORMED_CALLS.inc()
    message = {"role": "tool", "content": f"Malformed call: {what}."}
    return Observation(messages=[message], reward=0.0, terminated=False, truncated=False)


def _finish(
    lease: Lease, record: _Record, outcome: "trajectory_pb2.Outcome.ValueType", detail: str
) -> Trajectory:
    metrics.TURNS.inc(len(record.turns))
    return Trajectory(
        suite=lease.suite,
        split=lease.split,
        task_ordinal=lease.task_ordinal,
        task_id=record.opening.task_id if record.opening else "",
        level=record.opening.level if record.opening else 0,
        outcome=outcome,
        detail=detail,
        segments=record.conversation.segments() if record.conversation else (),
        turns=tuple(record.turns),
        reward=record.reward,
        temperature=lease.sampling.temperature,
        duration_seconds=time.monotonic() - record.start,
    )
