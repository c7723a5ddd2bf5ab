"""Leads all replicas through a transfer, side by side: vLLM's VLLMWeightSyncClient over gRPC."""

import json
import time
from collections.abc import Sequence
from typing import Any

import grpc

from learner.trainer.calls import RETRY_SECONDS
from learner.trainer.watchdog import Watchdog
from understudy.config import Config
from understudy.errors import PeerUnreachableError, UnderstudyError
from understudy.rpc import error_reason, open_sync_channel
from understudy.v1 import transfer_pb2, transfer_pb2_grpc, weight_pb2

_ASK_SECONDS = 10.0
_MARGIN_SECONDS = 2.0
"""By which a call outlives its step and the process the call, so that the error can be told."""
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Replicas:
    """The replicas of network.inference, as trainer rank 0 calls them.

    All steps raise UnderstudyError when a replica refuses, fails or is late: within
    learner.weights.transfer_seconds, after which the watchdog ends a process that still hangs.

    Args:
        config: the run's.
        epoch: of this trainer.
        watchdog: armed anew by each step, and left armed.
    """

    def __init__(self, config: Config, epoch: int, watchdog: Watchdog) -> None:
        network = config.network
        self._patience = network.connect_timeout_seconds
        self._seconds = config.learner.weights.transfer_seconds
        self._epoch = epoch
        self._watchdog = watchdog
        self._channels = {a: open_sync_channel(a, network) for a in network.inference}
        self._stubs = {
            address: transfer_pb2_grpc.TransferServiceStub(channel)
            for address, channel in self._channels.items()
        }
        self._num_workers: list[int] = []
        self._finish = transfer_pb2.FinishUpdateRequest()

    def close(self) -> None:
        """End all calls."""
        for channel in self._channels.values():
            channel.close()

    def wait_ready(self) -> int:
        """Wait until every replica can join a group. Returns the number of their workers.

        One that is starting or ending is waited for as long as that takes.

        Raises:
            PeerUnreachableError: one was away for network.connect_timeout_seconds.
            UnderstudyError: one refuses.
        """
        self._num_workers = [self._wait_one(address) for address in self._stubs]
        return sum(self._num_workers)

    def _wait_one(self, address: str) -> int:
        heard = time.monotonic()
        while True:
            try:
                return int(self._describe(address).result().num_workers)
            except grpc.RpcError as error:
                if error.code() not in _AWAY:
                    raise _failed(address, "DescribeReceiver", error) from None
                if error_reason(error) != error.code().name:  # it is there, and says why not
                    heard = time.monotonic()
            if time.monotonic() - heard > self._patience:
                raise PeerUnreachableError(
                    f"the replica at {address} did not answer within {self._patience:.0f} s; start "
                    "it, or correct network.inference"
                )
            time.sleep(RETRY_SECONDS)

    def check(self) -> None:
        """Raise UnderstudyError if a replica has left the group: it was started again."""
        for address, call in [(address, self._describe(address)) for address in self._stubs]:
            try:
                epoch = call.result().epoch
            except grpc.RpcError:
                continue  # away or starting: when it is back it shows
            if epoch != self._epoch:
                raise UnderstudyError(
                    f"the replica at {address} has left the group, started again perhaps; this "
                    "trainer starts again, so that all join anew"
                )

    def prepare(self, version: int, step: int, probe: weight_pb2.LogprobProbe) -> None:
        """Say what the next update is."""
        self._finish = transfer_pb2.FinishUpdateRequest(
            epoch=self._epoch, version=version, step=step, probe=probe
        )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every replica join the group, at ranks one behind the other."""
        requests, rank = [], init_info["rank_offset"]
        for num_workers in self._num_workers:
            info = json.dumps(init_info | {"rank_offset": rank}).encode()
            requests.append(transfer_pb2.InitTransferRequest(epoch=self._epoch, info=info))
            rank += num_workers
        self._step("InitTransfer", requests)

    def start_weight_update(self) -> None:
        """Pause every replica."""
        self._step("StartUpdate", self._each(transfer_pb2.StartUpdateRequest(epoch=self._epoch)))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have every replica receive; returns once all have."""
        info = json.dumps(update_info).encode()
        request = transfer_pb2.UpdateWeightsRequest(epoch=self._epoch, info=info)
        self._step("UpdateWeights", self._each(request))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have every replica serve what came, as the version that was prepared."""
        self._step("FinishUpdate", self._each(self._finish))

    def _each(self, request: object) -> list[object]:
        return [request] * len(self._stubs)

    def _step(self, name: str, requests: Sequence[object]) -> None:
        self._watchdog.arm(name, self._seconds + 2 * _MARGIN_SECONDS)
        calls = [
            (address, getattr(stub, name).future(request, timeout=self._seconds + _MARGIN_SECONDS))
            for (address, stub), request in zip(self._stubs.items(), requests, strict=True)
        ]
        # All are waited for: one that is called off would end its replica for nothing.
        errors = [(address, call.exception()) for address, call in calls]
        for address, error in errors:
            if error is not None:
                raise _failed(address, name, error)

    def _describe(self, address: str) -> Any:
        """A call whose result is DescribeReceiverResponse."""
        request = transfer_pb2.DescribeReceiverRequest()
        return self._stubs[address].DescribeReceiver.future(request, timeout=_ASK_SECONDS)


def _failed(address: str, name: str, error: grpc.RpcError) -> UnderstudyError:
    return UnderstudyError(
        f"{name} at the replica {address}: {error.code().name} ({error_reason(error)}): "
        f"{error.details()}"
    )
