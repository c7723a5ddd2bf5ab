"""Public async client: one typed class a service, over one channel each.

sampling = SamplingParameters(temperature=1.0, max_new_tokens=32)
async with InferenceClient.connect("127.0.0.1:7100") as inference:
    await inference.wait_ready()
    reply = await inference.generate(prompt_ids, sampling)  # prompt_ids: np.int32 [P]
    print(reply.token_ids, reply.logprobs, reply.version_spans)
"""

from understudy.client.base import wait_any_ready
from understudy.client.batches import Batch, BatchClient, BatchTrajectory
from understudy.client.bundle import BundleError, fetch_model_bundle
from understudy.client.control import ControlClient
from understudy.client.environment import EnvironmentClient, Observation, Opening, Session
from understudy.client.inference import BadReplyError, Generation, InferenceClient
from understudy.client.tasks import Lease, Leases, TaskClient
from understudy.client.trajectories import PushRefusedError, TrajectoryClient
from understudy.client.weights import WeightClient, Weights
from understudy.v1.common_pb2 import SamplingParameters
from understudy.weights.errors import WeightsRefusedError

__all__ = [
    "BadReplyError",
    "Batch",
    "BatchClient",
    "BatchTrajectory",
    "BundleError",
    "ControlClient",
    "EnvironmentClient",
    "Generation",
    "InferenceClient",
    "Lease",
    "Leases",
    "Observation",
    "Opening",
    "PushRefusedError",
    "SamplingParameters",
    "Session",
    "TaskClient",
    "TrajectoryClient",
    "WeightClient",
    "Weights",
    "WeightsRefusedError",
    "fetch_model_bundle",
    "wait_any_ready",
]
