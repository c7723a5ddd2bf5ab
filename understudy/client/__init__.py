"""Public async client: one typed class a service, over one channel each.

async with InferenceClient.connect("127.0.0.1:7100") as inference:
    reply = await inference.generate(prompt_ids, max_new_tokens=32)
    print(reply.token_ids, reply.logprobs, reply.version_spans)
"""

from understudy.client.bundle import fetch_model_bundle
from understudy.client.control import ControlClient
from understudy.client.environment import EnvironmentClient, Observation, Opening, Session
from understudy.client.inference import Generation, InferenceClient
from understudy.client.tasks import Lease, Leases, TaskClient

__all__ = [
    "ControlClient",
    "EnvironmentClient",
    "Generation",
    "InferenceClient",
    "Lease",
    "Leases",
    "Observation",
    "Opening",
    "Session",
    "TaskClient",
    "fetch_model_bundle",
]
