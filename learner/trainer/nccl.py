"""The values' way into vLLM's NCCL backend: the one trainer module that imports vLLM.

**Not run yet**: NCCL needs a GPU for the trainer and one for each of a replica's workers. What does
not need it, names, shapes and values, is tested.
"""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    uid_init_process_group,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks
from learner.trainer.replicas import Replicas
from learner.trainer.shards import checkpoint_tensors


class CheckpointSource(WeightSource):
    """A policy's values as the checkpoint has them, in the served dtype.

    Iterating gathers one parameter at a time, on all ranks together.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self._policy = policy
        self._dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of each tensor, without a gather."""
        return [
            ParamMeta(name, self._dtype, tuple(tensor.shape))
            for source, whole in self._sources()
            for name, tensor in checkpoint_tensors(
                self._policy, source, torch.empty(whole.shape, dtype=self._dtype, device="meta")
            ).items()
        ]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for source, tensor in self._sources():
            served = tensor.detach().to(self._dtype)  # before the gather: half the bytes
            whole = served.full_tensor() if isinstance(served, DTensor) else served
            yield from checkpoint_tensors(self._policy, source, whole.contiguous()).items()

    def _sources(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._policy.checkpoint_parameters()
        yield from self._policy.checkpoint_buffers()


def join_group(
    replicas: Replicas, source: WeightSource, ranks: Ranks
) -> NCCLTrainerWeightTransferEngine:
    """Join rank 0 and all replicas in one NCCL group; other ranks take part in gathers only.

    The group's id goes to the replicas in InitTransfer: vLLM's other way, a TCP store, has pickles
    on the wire.

    Raises:
        PeerUnreachableError, UnderstudyError: as Replicas, on rank 0.
    """
    sender = ranks.rank == 0
    engine = NCCLTrainerWeightTransferEngine(client=replicas, source=source, is_sender=sender)
    if not sender:
        return engine
    world_size = 1 + replicas.wait_ready()
    group_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
    info = NCCLWeightTransferInitInfo(
        rank_offset=1,
        world_size=world_size,
        nccl_unique_id_b64=base64.b64encode(group_id).decode(),
        packed=engine.packed,
        packed_buffer_size_bytes=engine.packed_buffer_size_bytes,
        packed_num_buffers=engine.packed_num_buffers,
    )
    # Both sides have to join at the same time. Never joined: it returns or the watchdog barks.
    thread = ThreadPoolExecutor(1)
    answers = thread.submit(replicas.init_weight_transfer_engine, worker_init_payload(info))
    thread.shutdown(wait=False)
    engine.model_update_group = uid_init_process_group(group_id, 0, world_size, ranks.device)
    answers.result()
    return engine
