"""Plays the attempts that an evaluation lacks, many at one time.

    missing (task, attempt) -> episode, again if the infrastructure failed it -> attempts file

All tasks get their first attempt before any gets its second.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterator

from actor.environment_pool import EnvironmentPool
from actor.episode import Episode, play_episode
from actor.evaluation.attempts import FAILED, Attempt, AttemptsFile, Key
from actor.evaluation.plan import EvaluationPlan, attempt_seed
from actor.policy import Policy, Speaker
from understudy.client import Lease
from understudy.config import Config
from understudy.errors import PeerUnreachableError
from understudy.evaluation import final_answer
from understudy.v1 import common_pb2, trajectory_pb2

_log = logging.getLogger(__name__)
FAILURES_IN_A_ROW = 50
"""So many attempts that failed, one after another, end an evaluation: something is down for good,
and the attempts that are left would only be used up."""
_TELL_EVERY_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
"""Before an attempt is tried again, times the tries so far."""


class Attempts:
    """One evaluation's attempts while they are played."""

    def __init__(
        self,
        config: Config,
        plan: EvaluationPlan,
        policy: Policy[Speaker],
        environments: EnvironmentPool,
        file: AttemptsFile,
    ) -> None:
        self._config = config
        self._plan = plan
        self._policy = policy
        self._environments = environments
        self._file = file
        self._failures_in_a_row = 0
        self._num_played = 0
        self._told = time.monotonic()

    async def play(self, num_tasks: int) -> None:
        """Play what is missing, and once more what failed before.

        Raises:
            PeerUnreachableError: FAILURES_IN_A_ROW attempts failed one after another.
        """
        missing = [
            (task, attempt)
            for attempt in range(self._plan.k)
            for task in range(num_tasks)
            if not (known := self._file.attempts.get((task, attempt))) or known.has_failed
        ]
        _log.info("%d of %d attempts to play", len(missing), num_tasks * self._plan.k)
        keys = iter(missing)
        workers = [
            asyncio.create_task(self._work(keys, len(missing)))
            for _ in range(min(self._config.actor.concurrency, len(missing)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, keys: Iterator[Key], num_missing: int) -> None:
        for task, index in keys:
            attempt = await self._attempt(task, index)
            await self._file.add(attempt)
            self._failures_in_a_row = self._failures_in_a_row + 1 if attempt.has_failed else 0
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise PeerUnreachableError(
                    f"{FAILURES_IN_A_ROW} attempts in a row failed, the last by "
                    f"{attempt.outcome}: {attempt.detail}; what was played before is kept with "
                    "--out: mend this and start again"
                )
            self._tell(num_missing)

    async def _attempt(self, task: int, index: int) -> Attempt:
        lease = self._lease(task, index)
        for tries in range(1, self._plan.max_tries + 1):
            episode = await play_episode(self._policy, self._environments, lease)
            outcome = outcome_name(episode)
            if outcome not in FAILED:
                break
            _log.warning(
                "attempt %d at task %d, try %d: %s: %s", index, task, tries, outcome, episode.detail
            )
            if tries < self._plan.max_tries:
                await asyncio.sleep(_PAUSE_SECONDS * tries)
        return _attempt_of(lease, episode, tries)

    def _lease(self, task: int, index: int) -> Lease:
        tasks = self._config.learner.tasks
        return Lease(
            lease_id=task,
            ordinal=task,
            sample_index=index,
            suite=self._plan.suite,
            split=self._plan.split,
            task_ordinal=task,
            sampling=common_pb2.SamplingParameters(
                temperature=self._plan.temperature,
                max_new_tokens=tasks.max_new_tokens,
                seed=attempt_seed(self._plan.seed, task, index),
            ),
            max_turns=tasks.max_turns,
            max_tokens=tasks.max_tokens,
            min_version=0,
            expires_after_seconds=math.inf,
        )

    def _tell(self, num_missing: int) -> None:
        self._num_played += 1
        if time.monotonic() - self._told >= _TELL_EVERY_SECONDS:
            self._told = time.monotonic()
            _log.info("%d of %d attempts played", self._num_played, num_missing)


def outcome_name(episode: Episode[Speaker]) -> str:
    """E.g. `completed` or `environment_failed`."""
    return trajectory_pb2.Outcome.Name(episode.outcome).removeprefix("OUTCOME_").lower()


def _attempt_of(lease: Lease, episode: Episode[Speaker], tries: int) -> Attempt:
    opening, speaker, outcome = episode.opening, episode.speaker, outcome_name(episode)
    says_nothing = outcome in FAILED or opening is None or opening.unscored
    return Attempt(
        task=lease.task_ordinal,
        attempt=lease.sample_index,
        task_id=opening.task_id if opening else "",
        level=opening.level if opening else 0,
        tags=opening.tags if opening else (),
        outcome=outcome,
        detail=episode.detail,
        reward=None if says_nothing else episode.reward,
        tries=tries,
        turns=len(episode.turns),
        tokens=speaker.num_tokens if speaker else 0,
        sampled_tokens=speaker.num_sampled_tokens if speaker else 0,
        versions=tuple(sorted(speaker.versions)) if speaker else (),
        seconds=round(episode.seconds, 3),
        answer=final_answer(episode.answer),
        messages=tuple(episode.messages),
    )
