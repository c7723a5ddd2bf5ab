"""From a run's configuration to the policy that plays it, with the connections that takes."""

import contextlib
from collections.abc import AsyncIterator

from actor.agents.speaker import AgentPolicy
from actor.inference_pool import InferencePool
from actor.policy import Policy, Speaker
from actor.tokens import TokenPolicy
from understudy.chat import ChatFormat
from understudy.config import Config


@contextlib.asynccontextmanager
async def agent_policy(config: Config, policy: Policy[Speaker]) -> AsyncIterator[Policy[Speaker]]:
    """The agent that config.actor.agent names, or the policy itself if it names none.

    Args:
        config: the run's.
        policy: the run's own, or an endpoint.

    Raises:
        ConfigError: another policy's model folder has no usable tokenizer or template.
        PeerUnreachableError: none of its inference servers answers.
    """
    if not config.actor.agent:
        yield policy
        return
    policies, pools = {"": policy}, list[InferencePool]()
    try:
        for name, other in config.policies.items():
            chat = ChatFormat.load(other.model, other.tools)
            network = config.network.model_copy(update={"inference": other.inference})
            pools.append(InferencePool(network, config.actor.generate_timeout_seconds))
            await pools[-1].wait_ready()
            policies[name] = TokenPolicy(chat, pools[-1])
        yield AgentPolicy(config.actor.agent, config.agents, policies)
    finally:
        for pool in pools:
            await pool.close()
