"""Which policy plays an evaluation: the run's inference service, or an endpoint.

Each is entered first, which waits for its peers, and opened once it is known that there is
something to play.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from actor.inference_pool import InferencePool
from actor.policy import Policy, Speaker
from actor.server import fetch_chat, recording_endpoint
from actor.tokens import TokenPolicy
from understudy.client import TaskClient
from understudy.config import Config
from understudy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A policy that answers."""

    policy: Policy[Speaker]
    name: str
    """What it is called in settings; another name is another policy."""
    tools: str
    """How prompts list tools, where that is ours to say: `model.tools`; else empty."""


Opener = Callable[[], Awaitable[Backend]]


@contextlib.asynccontextmanager
async def service_backend(config: Config) -> AsyncIterator[Opener]:
    """The policy that the run's inference servers serve when it is opened.

    Raises:
        PeerUnreachableError: no learner, or no inference server that has weights.
        ConfigError: the learner's model folder has no usable tokenizer or template.
    """
    learner = TaskClient(config.network.learner, config.network)
    inference = InferencePool(
        config.network,
        config.actor.generate_timeout_seconds,
        with_routes=config.model.router_replay,
    )
    stack = contextlib.AsyncExitStack()
    try:
        for peer in (learner, inference):
            await peer.wait_ready()

        async def open() -> Backend:
            chat = await fetch_chat(config, learner)
            recordings = await stack.enter_async_context(
                recording_endpoint(config, chat, inference)
            )
            version = await inference.newest_version()
            name = f"version {version} of run {config.run.name}"
            policy = TokenPolicy(chat, inference, recordings)
            return Backend(policy=policy, name=name, tools=config.model.tools)

        yield open
    finally:
        await stack.aclose()
        for peer in (learner, inference):
            await peer.close()


@dataclass(frozen=True, kw_only=True)
class EndpointPlan:
    """What the command line says about an endpoint."""

    url: str
    model: str
    key_variable: str
    key_file: Path | None


@contextlib.asynccontextmanager
async def endpoint_backend(config: Config, plan: EndpointPlan) -> AsyncIterator[Opener]:
    """A model behind an OpenAI-compatible endpoint.

    Raises:
        ConfigError: no usable URL or key, a key that would go in plaintext, or a model that the
            endpoint refuses.
        PeerUnreachableError: the endpoint does not answer.
    """
    try:
        from actor.evaluation.endpoint import Endpoint, EndpointPolicy, check_url, read_key
    except ImportError as error:
        raise ConfigError(
            f"--endpoint: {error}; install the extra: pip install 'understudy[eval]'"
        ) from None
    key = read_key(plan.key_variable, plan.key_file)
    check_url(plan.url, key is not None, config.network)
    endpoint = Endpoint(url=plan.url, model=plan.model, key=key)
    policy = EndpointPolicy(endpoint, config.actor.generate_timeout_seconds)

    async def open() -> Backend:
        await policy.wait_ready(
            config.learner.tasks.max_new_tokens, config.network.connect_timeout_seconds
        )
        return Backend(policy=policy, name=endpoint.name, tools="")

    try:
        yield open
    finally:
        await policy.close()
