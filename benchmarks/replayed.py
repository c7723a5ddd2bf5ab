"""Are the trained tokens the sampled ones? Episodes of every path, replayed through an engine.

    services, actor -> trajectories -> what the trainer's loss is given
                    \\-> every reply that inference gave, as it gave it

By each path of `paths.py` episodes are played at temperature 1 by an actor's own parts. Then, for
what the trainer would learn from them:

- Every run of tokens that counts in the loss is a reply of the inference service, at the place of
  its prompt, with its log-probabilities, bit for bit; and the other way. So no token of an
  observation is in the loss, nor is one missing.
- An engine that is started anew from the model's folder reads the whole segment, and gives the
  recorded log-probabilities.

A JSON line a path; exit status 1 if a reply differs or a gap is above TOLERANCE:

    {"bench": "replayed", "path": "mcp", "episodes": 1000, "multi_turn": 1000, "replies": 3000,
     "tokens": 160000, "tokens_in_loss": 60000, "replies_that_differ": 0, "mean_gap": 1e-07,
     "max_gap": 1e-05, "seconds": 600.0}

It takes a model of the demo, by default the trained one that `make demo` leaves.
"""

import argparse
import asyncio
import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.server import fetch_chat, recording_endpoint
from actor.tokens import TokenPolicy
from benchmarks.measured import measuring
from benchmarks.paths import MODEL, PATHS, SLOW, SUITES
from inference.vllm_settings import engine_args, set_vllm_environment
from learner.trainer.experience import Sample, episodes_of
from learner.trainer.intake_client import BatchShare
from understudy.client import Generation, Lease, TaskClient
from understudy.config import Config, load_config
from understudy.trajectory import FloatArray, IntArray, Trajectory, encode_trajectory
from understudy.v1 import batch_pb2, common_pb2, trajectory_pb2

FOLDER = Path("runs/replayed")
TOLERANCE = 1e-3
"""Largest difference of a log-probability that passes: float32 sums, in another order."""
SPLIT = "train"
Reply = tuple[bytes, bytes]
"""Token ids from the beginning of the prompt to the end of a reply, and its log-probabilities."""


def main() -> None:
    """Play and replay by every path with the same policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the policy")
    parser.add_argument("--num-episodes", type=int, default=1000, help="of several turns, a path")
    parser.add_argument("--path", choices=PATHS, action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    if not arguments.model.exists():
        parser.error(f"{arguments.model} does not exist; `make demo` makes it")
    tables = {SUITES[path]: way.table for path, way in PATHS.items()}
    with measuring(FOLDER, arguments.model, tables, SLOW) as policy:
        config = load_config(policy.config_file)
        reader = Reader(config, arguments.model)
        passed = True
        for path in arguments.path or PATHS:
            settings = load_config(policy.config_file, PATHS[path].settings)
            start = time.monotonic()
            played = uvloop.run(Playing(settings, SUITES[path], arguments.num_episodes).run())
            line = {"bench": "replayed", "path": path, **played.figures(), **reader.gaps(played)}
            print(json.dumps(line | {"seconds": round(time.monotonic() - start)}), flush=True)
            passed &= not line["replies_that_differ"] and line["max_gap"] <= TOLERANCE
    sys.exit(not passed)


class Witness(InferencePool):
    """Keeps what inference was asked and what it answered."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.network, config.actor.generate_timeout_seconds)
        self.replies: Counter[Reply] = Counter()

    async def generate(self, prompt: IntArray, *more: Any, **others: Any) -> Generation:
        """Ask, and remember."""
        generation = await super().generate(prompt, *more, **others)
        tokens = np.concatenate([prompt, generation.token_ids])
        self.replies[_reply(tokens, generation.logprobs)] += 1
        return generation


def _reply(tokens: IntArray, logprobs: FloatArray) -> Reply:
    return tokens.astype(np.int32).tobytes(), logprobs.astype(np.float32).tobytes()


class Played:
    """Episodes of one path, as the trainer would get them."""

    def __init__(self, trajectories: Sequence[Trajectory], replies: Counter[Reply]) -> None:
        self.trajectories, self.replies = trajectories, replies
        self.samples = [s for e in episodes_of(_share(trajectories), None) for s in e.samples]

    def figures(self) -> dict[str, Any]:
        """How many of what, and whether the replies in the loss are those of inference."""
        in_loss = Counter(reply for sample in self.samples for reply in replies_of(sample))
        differ = (in_loss - self.replies) + (self.replies - in_loss)
        return {
            "episodes": len(self.trajectories),
            "multi_turn": sum(map(is_multi_turn, self.trajectories)),
            "replies": self.replies.total(),
            "tokens": sum(len(sample.token_ids) for sample in self.samples),
            "tokens_in_loss": sum(sample.num_targets for sample in self.samples),
            "replies_that_differ": differ.total(),
        }


def replies_of(sample: Sample) -> Iterator[Reply]:
    """The runs of tokens that count in the loss; between two replies a template says something."""
    edges = np.flatnonzero(np.diff(sample.loss_mask, prepend=False, append=False))
    offset = 0
    for start, end in edges.reshape(-1, 2):
        logprobs = sample.behaviour_logprobs[offset : offset + end - start]
        yield _reply(sample.token_ids[:end], logprobs)
        offset += end - start


def is_multi_turn(trajectory: Trajectory) -> bool:
    """Several replies, and a tool called."""
    return len(trajectory.turns) > 1 and any(turn.num_tool_calls for turn in trajectory.turns)


def _share(trajectories: Sequence[Trajectory]) -> BatchShare:
    """A batch of one group, by the wire's format."""
    rewards = np.array([trajectory.reward for trajectory in trajectories], "<f4")
    versions = {version for trajectory in trajectories for version in trajectory.versions}
    header = batch_pb2.BatchHeader(
        groups=[batch_pb2.BatchGroup(rewards=rewards.tobytes())],
        steps_behind=dict.fromkeys(versions, 0),
    )
    messages = [
        batch_pb2.BatchTrajectory(reward_index=index, record=_record(trajectory))
        for index, trajectory in enumerate(trajectories)
    ]
    return BatchShare(header=header, trajectories=tuple(messages))


def _record(trajectory: Trajectory) -> trajectory_pb2.TrajectoryRecord:
    payload = encode_trajectory(trajectory)
    return trajectory_pb2.TrajectoryRecord(
        encoding=common_pb2.ENCODING_ZSTD,
        payload=payload,
        payload_digest=hashlib.sha256(payload).digest(),
    )


class Playing:
    """Plays one path's suite with an actor's own parts."""

    def __init__(self, config: Config, suite: str, num_wanted: int) -> None:
        self._config, self._suite, self._num_wanted = config, suite, num_wanted
        self._trajectories: list[Trajectory] = []
        self._next_task = 0

    async def run(self) -> Played:
        """Play until enough episodes had several turns."""
        config = self._config
        learner = TaskClient(config.network.learner, config.network)
        inference = Witness(config)
        environments = EnvironmentPool(config.network, config.actor.step_timeout_seconds)
        for peer in (learner, inference, environments):
            await peer.wait_ready()
        chat = await fetch_chat(config, learner)
        async with recording_endpoint(config, chat, inference) as recordings:
            player = Player(TokenPolicy(chat, inference, recordings), environments)
            await asyncio.gather(*(self._work(player) for _ in range(config.actor.concurrency)))
        for peer in (learner, inference, environments):
            await peer.close()
        return Played(self._trajectories, inference.replies)

    async def _work(self, player: Player) -> None:
        while sum(map(is_multi_turn, self._trajectories)) < self._num_wanted:
            self._next_task += 1
            self._trajectories.append(await player.play(self._lease(self._next_task)))

    def _lease(self, task: int) -> Lease:
        tasks = self._config.learner.tasks
        sampling = common_pb2.SamplingParameters(
            temperature=1.0, max_new_tokens=tasks.max_new_tokens
        )
        return Lease(
            lease_id=task,
            ordinal=task,
            sample_index=0,
            suite=self._suite,
            split=SPLIT,
            task_ordinal=task,
            sampling=sampling,
            max_turns=tasks.max_turns,
            max_tokens=tasks.max_tokens,
            min_version=0,
            expires_after_seconds=600.0,
        )


class Reader:
    """An engine of its own, with the weights that the model's folder has."""

    def __init__(self, config: Config, model: Path) -> None:
        set_vllm_environment(config.inference)
        from vllm import LLM, EngineArgs

        arguments = engine_args(model, config.inference, config.model)
        arguments.load_format = "auto"
        arguments.enable_prefix_caching = False  # everything is read
        known = dataclasses.fields(EngineArgs)  # what an AsyncLLM alone takes is left out
        self._llm = LLM(**{field.name: getattr(arguments, field.name) for field in known})

    def gaps(self, played: Played) -> dict[str, float]:
        """How far the log-probabilities of what is in the loss are from the recorded ones."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=s.token_ids.tolist()) for s in played.samples]
        params = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        gaps = np.concatenate(
            [
                np.abs(_read(output)[sample.loss_mask[1:]] - sample.behaviour_logprobs)
                for output, sample in zip(outputs, played.samples, strict=True)
            ]
        )
        return {"mean_gap": float(f"{gaps.mean():.2g}"), "max_gap": float(f"{gaps.max():.2g}")}


def _read(output: Any) -> FloatArray:
    """[T-1] log-probability of each token but the first."""
    return np.asarray(output.prompt_logprobs.logprobs, np.float32)


if __name__ == "__main__":
    main()
