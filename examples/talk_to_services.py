"""A tour of all services of a running run: plays one episode by hand, from lease to trajectory.

    understudy run --config RUN.toml            # in another terminal; writes runs/NAME/config.json
    python examples/talk_to_services.py runs/NAME/config.json

It is the smallest actor there is, and what it plays is trained on like anything else. It calls
nothing but `understudy.client`; of the generated code it uses the names of outcomes and states.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

from understudy.chat import ChatFormat, parse_reply
from understudy.client import (
    BatchClient,
    ControlClient,
    EnvironmentClient,
    InferenceClient,
    Lease,
    SamplingParameters,
    TaskClient,
    TrajectoryClient,
    WeightClient,
)
from understudy.config import Config, load_config
from understudy.rpc import error_reason
from understudy.trajectory import Segment, Trajectory, Turn
from understudy.v1 import control_pb2, trajectory_pb2

ACTOR = "tour"
COMPLETED, TRUNCATED = trajectory_pb2.OUTCOME_COMPLETED, trajectory_pb2.OUTCOME_TRUNCATED


async def tour(config: Config) -> None:
    """Talk to every service once."""
    network = config.network
    async with (
        TaskClient(network.learner, network) as tasks,
        WeightClient(network.learner, network) as weights,
        TrajectoryClient(
            network.learner, network, actor_id=ACTOR, run_id=config.run.name
        ) as trajectories,
        BatchClient(network.learner, network) as batches,
        InferenceClient(network.inference[0], network) as inference,
        EnvironmentClient(network.envservers[0], network) as environment,
    ):
        # ControlService: every role has it on its own port.
        for address in (tasks.address, inference.address, environment.address):
            async with ControlClient(address, network) as control:
                status = await control.status()
                state = control_pb2.RoleState.Name(status.state).removeprefix("ROLE_STATE_")
                print(f"{status.role} at {address}: {state} {dict(status.figures)}")

        # WeightService: the newest version, and the files that go with the weights.
        async with asyncio.timeout(10), contextlib.aclosing(weights.watch_versions()) as versions:
            newest = await anext(versions)
        with tempfile.TemporaryDirectory() as folder:
            digest = await weights.fetch_model_bundle(Path(folder))
            chat = ChatFormat.load(Path(folder), config.model.tools)
        print(f"version {newest.version} has {newest.step} steps behind it; bundle {digest[:12]}")

        # TaskService: the right to play one episode.
        answer = await tasks.lease(ACTOR, max_leases=1, timeout=10)
        if not answer.leases:
            print("no task is free" + " any more" * answer.exhausted)
            return
        lease = answer.leases[0]
        suite = await environment.describe(lease.suite)
        sizes = {split.name: split.num_tasks for split in suite.splits}
        print(f"leased: task {lease.task_ordinal} of {lease.suite} {lease.split}; splits {sizes}")

        # InferenceService and EnvironmentService: the episode.
        model = await inference.describe()
        print(f"{model.engine} serves version {model.version}")
        trajectory = await play(lease, chat, inference, environment)
        print(f"{trajectory.task_id}: {len(trajectory.turns)} turns, reward {trajectory.reward}")

        # TrajectoryService: what the learner gets.
        await trajectories.push(lease, trajectory)
        await trajectories.flush()
        print(f"{trajectory.num_tokens} tokens sent and acked")

        # BatchService: the trainer's. Errors carry a reason in capitals and a remedy in words.
        try:
            await batches.next_batch(step=0)  # without start_training, which fences the trainer
        except grpc.aio.AioRpcError as error:
            print(f"{error.code().name} ({error_reason(error)}): {error.details()}")


async def play(
    lease: Lease, chat: ChatFormat, inference: InferenceClient, environment: EnvironmentClient
) -> Trajectory:
    """One episode. Each turn is a segment of its own: the prompt, then the reply."""
    start, reward, outcome = time.monotonic(), 0.0, TRUNCATED
    segments: list[Segment] = []
    turns: list[Turn] = []
    async with environment.session() as session:
        opening = await session.reset(lease.suite, lease.split, lease.task_ordinal)
        messages = [harmless(chat, message) for message in opening.messages]
        while len(turns) < lease.max_turns and outcome == TRUNCATED:
            prompt = chat.encode(chat.render(messages, opening.tools, add_generation_prompt=True))
            room = min(lease.max_tokens - len(prompt), lease.sampling.max_new_tokens)
            if room < 1:
                break
            sampling = SamplingParameters(
                temperature=lease.sampling.temperature,
                max_new_tokens=room,
                stop_token_ids=chat.stop_token_ids,
            )
            asked = time.monotonic()
            generation = await inference.generate(prompt, sampling, min_version=lease.min_version)
            generated = time.monotonic()
            num_sampled = len(generation.token_ids)
            segments.append(
                Segment(
                    token_ids=np.concatenate((prompt, generation.token_ids)),
                    loss_mask=np.repeat([False, True], [len(prompt), num_sampled]),
                    logprobs=generation.logprobs,
                    version_spans=generation.version_spans,
                )
            )
            if generation.cut_off:
                break
            text = chat.decode(generation.token_ids[:-1])
            reply = parse_reply(text)
            calls = [(call.name, call.arguments) for call in reply.calls]
            observation = await session.step(calls, reply.text)
            turns.append(
                Turn(
                    segment=len(segments) - 1,
                    start=0,
                    end=num_sampled,
                    reward=observation.reward,
                    num_tool_calls=len(calls),
                    malformed_call=bool(reply.malformed),
                    generate_seconds=generated - asked,
                    step_seconds=time.monotonic() - generated,
                )
            )
            reward += observation.reward
            messages.append({"role": "assistant", "content": text})
            messages += [harmless(chat, message) for message in observation.messages]
            if observation.terminated:
                outcome = COMPLETED
            if observation.truncated:
                break
    return Trajectory(
        suite=lease.suite,
        split=lease.split,
        task_ordinal=lease.task_ordinal,
        task_id=opening.task_id,
        level=opening.level,
        outcome=outcome,
        detail="" if outcome == COMPLETED else "a limit was reached",
        segments=tuple(segments),
        turns=tuple(turns),
        reward=reward,
        temperature=lease.sampling.temperature,
        duration_seconds=time.monotonic() - start,
    )


def harmless(chat: ChatFormat, message: dict[str, str]) -> dict[str, str]:
    """A message from outside in which special tokens are broken, so that it cannot end its turn."""
    return {**message, "content": chat.neutralise(message["content"])}


def main() -> None:
    """Read the run's configuration and take the tour."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="the run's TOML, or runs/NAME/config.json")
    asyncio.run(tour(load_config(parser.parse_args().config)))


if __name__ == "__main__":
    main()
