"""The endpoint of one actor process: HTTP in, sessions behind, errors as OpenAI has them."""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterator

from aiohttp import web
from aiohttp.typedefs import Handler

from actor.inference_pool import InferencePool
from actor.policy import CutShortError, InferenceFailedError
from actor.recording.recorder import Recorded
from actor.recording.request import ChatRequest, RequestError, read_request
from actor.recording.response import (
    MODEL,
    completion_body,
    completion_events,
    error_body,
    model_body,
)
from actor.recording.session import EpisodeEndedError, RecordingSession
from understudy import metrics
from understudy.chat import ChatFormat
from understudy.client import Lease
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.rpc.channels import is_local

_log = logging.getLogger(__name__)
MAX_BODY_BYTES = 8 * 2**20
MAX_REQUESTS = 64
"""Requests of one episode at one time; one more is told to come again."""
_TOKEN_BYTES = 24
_STOP_SECONDS = 1.0
_ANYWHERE = ("0.0.0.0:", "[::]:")
_SESSION = web.RequestKey("session", RecordingSession)


class Recordings:
    """All episodes that are recorded now, by token."""

    def __init__(self, chat: ChatFormat, inference: InferencePool) -> None:
        self.base_url = ""
        """Where the environment servers' machines reach the endpoint; set once it is bound."""
        self._chat = chat
        self._inference = inference
        self._sessions: dict[str, RecordingSession] = {}
        self._num_requests: dict[str, int] = {}

    @contextlib.contextmanager
    def session(self, lease: Lease) -> Iterator[RecordingSession]:
        """An endpoint for one episode; unknown as soon as the block ends."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        url = f"{self.base_url}/{token}/v1"
        session = RecordingSession(self._chat, self._inference, lease, url)
        self._sessions[token] = session
        try:
            yield session
        finally:
            del self._sessions[token]
            session.close()

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_post("/{token}/v1/chat/completions", self._complete)
        app.router.add_get("/{token}/v1/models", self._models)
        app.router.add_get("/{token}/v1/models/{model}", self._model)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Find the session; whatever goes wrong has a body that clients can read."""
        token = request.match_info.get("token", "")
        session = self._sessions.get(token)
        if session is None:
            return _error("ended", 404, "no episode goes by this URL: it has ended, or never was")
        if self._num_requests.get(token, 0) >= MAX_REQUESTS:
            text = f"{MAX_REQUESTS} requests of this episode are under way; try again"
            return _error("busy", 429, text)
        self._num_requests[token] = self._num_requests.get(token, 0) + 1
        request[_SESSION] = session
        try:
            return await handler(request)
        except web.HTTPException as error:  # of aiohttp: no such route, or a body that is too long
            return _error("refused", error.status, f"{error.reason}; see docs/harness.md")
        except Exception:  # a fault of ours: the request has no answer, and the log has the text
            _log.exception("a request to the recording endpoint failed")
            return _error("fault", 500, "the actor's log says what went wrong")
        finally:
            self._num_requests[token] -= 1
            if not self._num_requests[token]:
                del self._num_requests[token]

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = read_request(await request.read())
            recorded = await request[_SESSION].complete(asked)
        except RequestError as error:
            return _error("refused", 400, str(error), parameter=error.parameter)
        except CutShortError as error:
            outcome = "too_long" if "max_tokens" in str(error) else "limited"
            return _error(outcome, 400, f"the episode's limit is reached: {error}")
        except InferenceFailedError as error:
            return _error("failed", 503, str(error))
        except EpisodeEndedError:
            return _error("ended", 404, "the episode has ended")
        except asyncio.CancelledError:  # the client went away: nothing was recorded
            metrics.RECORDING_REQUESTS.labels("abandoned").inc()
            raise
        metrics.RECORDING_REQUESTS.labels(recorded.how).inc()
        if asked.stream:
            return await self._stream(request, asked, recorded)
        return web.json_response(completion_body(recorded, asked, self._chat))

    async def _stream(
        self, request: web.Request, asked: ChatRequest, recorded: Recorded
    ) -> web.StreamResponse:
        """All at once: a reply is sampled by a unary call, and is recorded before it is shown."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in completion_events(recorded, asked, self._chat):
            await response.write(event)
        await response.write_eof()
        return response

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [model_body()]})

    async def _model(self, request: web.Request) -> web.Response:
        if request.match_info["model"] != MODEL:
            return _error("refused", 404, f"the only model is {MODEL!r}")
        return web.json_response(model_body())


_CODES = {
    "ended": ("invalid_request_error", "episode_ended"),
    "busy": ("rate_limit_error", "too_many_requests"),
    "refused": ("invalid_request_error", "unsupported"),
    "limited": ("invalid_request_error", "episode_limit"),
    "too_long": ("invalid_request_error", "context_length_exceeded"),
    "fault": ("server_error", "internal"),
    "failed": ("server_error", "inference_failed"),
}
"""Type and code by outcome."""


def _error(outcome: str, status: int, message: str, parameter: str | None = None) -> web.Response:
    metrics.RECORDING_REQUESTS.labels(outcome).inc()
    kind, code = _CODES[outcome]
    # OpenAI's clients try a 503 again, which would only prolong an episode that has failed.
    headers = {"x-should-retry": "true" if outcome == "busy" else "false"}
    body = json.dumps(error_body(message, kind, code, parameter))
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)


@contextlib.asynccontextmanager
async def serve_recordings(
    config: Config, chat: ChatFormat, inference: InferencePool
) -> AsyncIterator[Recordings]:
    """Serve on actor.recording_listen until the block ends.

    Raises:
        ConfigError: the address is taken, is plaintext beyond this machine, or is one that nobody
            can call and actor.recording_url does not say how.
    """
    listen = config.actor.recording_listen
    assert listen
    _require_local(listen, config.network.insecure)
    if listen.startswith(_ANYWHERE) and not config.actor.recording_url:
        raise ConfigError(
            f"actor.recording_listen = {listen!r} is no address to call; say in "
            "actor.recording_url how environment servers reach this machine"
        )
    host, _, port = listen.rpartition(":")
    recordings = Recordings(chat, inference)
    runner = web.AppRunner(
        recordings.application(),
        access_log=None,  # which would have the tokens
        handler_cancellation=True,
        shutdown_timeout=_STOP_SECONDS,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            raise ConfigError(f"actor.recording_listen = {listen!r}: {error.strerror}") from None
        bound = f"{host}:{runner.addresses[0][1]}"
        recordings.base_url = config.actor.recording_url.rstrip("/") or f"http://{bound}"
        _log.info("recording endpoint on %s", bound)
        yield recordings
    finally:
        await runner.cleanup()


def _require_local(listen: str, insecure: bool) -> None:
    if is_local(listen):
        return
    if not insecure:
        raise ConfigError(
            f"actor.recording_listen = {listen!r} is not on loopback, and the endpoint speaks "
            "plaintext; put a proxy with TLS before it and name that in actor.recording_url, or "
            "pass --insecure"
        )
    _log.warning("actor.recording_listen = %s: plaintext beyond this machine (insecure)", listen)
