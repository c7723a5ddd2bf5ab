"""One episode's endpoint: its lease's limits, and what went wrong behind it."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

import jinja2

from actor.inference_pool import InferencePool
from actor.policy import CutShortError, InferenceFailedError
from actor.recording.recorder import Prompt, Recorded, Recorder
from actor.recording.request import ChatRequest, RequestError
from actor.tokens import sample
from understudy import metrics
from understudy.chat import ChatFormat
from understudy.client import Generation, Lease

T = TypeVar("T")


class EpisodeEndedError(Exception):
    """The episode is over: nobody speaks for the policy any more."""


class RecordingSession:
    """Answers requests as long as the episode lives.

    The first failure of inference ends it. A limit of the lease refuses requests, and the episode
    counts as cut short, whatever the harness makes of it.
    """

    def __init__(self, chat: ChatFormat, inference: InferencePool, lease: Lease, url: str) -> None:
        self.url = url
        """Base URL, with the token in it."""
        self.recorder = Recorder(chat, lease.max_tokens)
        self.failure = ""
        """What inference failed of."""
        self.cut_short = ""
        """The limit that was reached first."""
        self._chat = chat
        self._inference = inference
        self._lease = lease
        self._failed = asyncio.Event()
        self._running: set[asyncio.Task[Generation]] = set()
        self._num_sampled = 0
        self._closed = False

    async def complete(self, request: ChatRequest) -> Recorded:
        """Sample and record one reply.

        Raises:
            EpisodeEndedError: before the reply was there.
            RequestError: the template refuses the messages, or nobody can write the reply.
            CutShortError: the lease allows no further reply, or none to so long a prompt.
            InferenceFailedError: nobody answered; the episode is over.
        """
        if self._closed:
            raise EpisodeEndedError
        if self.failure:
            raise InferenceFailedError(self.failure)
        try:
            return await self._complete(request)
        except CutShortError as error:
            self.cut_short = self.cut_short or str(error)
            raise
        except RecursionError:  # of a call's arguments, by either side
            raise RequestError("messages", "arguments are nested too deeply") from None
        except InferenceFailedError as error:
            self.failure = self.failure or str(error)
            self._failed.set()
            raise

    async def _complete(self, request: ChatRequest) -> Recorded:
        if self.recorder.num_turns + len(self._running) >= self._lease.max_turns:
            raise CutShortError(f"max_turns = {self._lease.max_turns}")
        try:
            prompt = self.recorder.prompt(request)
        except jinja2.TemplateError as error:
            raise RequestError("messages", f"the chat template refuses them: {error}") from None
        start = time.monotonic()
        generation = await self._sample(prompt, request.max_new_tokens)
        if not len(generation.token_ids):
            raise InferenceFailedError("a reply had no token")
        recorded = self.recorder.record(request, prompt, generation, time.monotonic() - start)
        if recorded.reply.malformed:
            metrics.MALFORMED_CALLS.inc()
        if generation.cut_off and len(generation.token_ids) < request.max_new_tokens:
            self.cut_short = self.cut_short or "a reply was cut off at its token limit"
        return recorded

    async def _sample(self, prompt: Prompt, max_new_tokens: int) -> Generation:
        """In a task of its own, which a closed session ends and an abandoned request too."""
        turn, self._num_sampled = self._num_sampled, self._num_sampled + 1
        sampling = asyncio.create_task(
            sample(self._chat, self._inference, self._lease, prompt.token_ids, turn, max_new_tokens)
        )
        self._running.add(sampling)
        try:
            return await sampling
        except asyncio.CancelledError:
            if self._closed:
                raise EpisodeEndedError from None
            raise
        finally:
            self._running.discard(sampling)

    async def accompany(self, ending: Awaitable[T]) -> T:
        """Wait for what ends the episode.

        Raises:
            InferenceFailedError: inference failed before, whatever the harness made of it.
        """
        end = asyncio.ensure_future(ending)
        failing = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait((end, failing), return_when=asyncio.FIRST_COMPLETED)
            if self.failure:
                raise InferenceFailedError(self.failure)
            return end.result()
        finally:
            for task in (end, failing):
                task.cancel()
            await asyncio.gather(end, failing, return_exceptions=True)

    def close(self) -> None:
        """End what is under way; requests are refused from now on."""
        self._closed = True
        for sampling in self._running:
            sampling.cancel()
