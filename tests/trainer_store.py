"""A weight store of a few lines, in memory, with faults on demand, to test the trainer on."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.encoding import apply
from understudy.weights.layout import HostBuffer, Layout
from understudy.weights.manifest import check_slices, check_values, slice_bytes

Parts = dict[int, tuple[weight_pb2.PartHeader, bytes]]


@dataclass
class StoredVersion:
    """A version that was committed."""

    number: int
    parts: Parts
    buffer: HostBuffer

    @property
    def header(self) -> weight_pb2.PartHeader:
        return self.parts[0][0]

    @property
    def num_bytes(self) -> int:
        return sum(len(payload) for _, payload in self.parts.values())

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Tensors as words, in their shapes."""
        found = {}
        for entry in self.buffer.layout:
            words = "<u2" if entry.dtype == "BF16" else "<u4"
            flat = self.buffer.tensor_bytes(entry.name).view(words)
            found[entry.name] = flat.reshape(entry.shape)
        return found


@dataclass
class StoredRun:
    """What the store has of one run."""

    versions: list[StoredVersion] = field(default_factory=list)
    open: Parts = field(default_factory=dict)
    """Parts of the publication that is not whole."""
    num_issued: int = 0
    """Versions that there ever were."""

    @property
    def head(self) -> int:
        """Newest version that is held; 0 for none."""
        return self.versions[-1].number if self.versions else 0


class Store(weight_pb2_grpc.WeightServiceServicer):
    """Commits a version when all parts are there, of as many runs as there are."""

    def __init__(self, on_commit: Callable[[int], object] = lambda step: None) -> None:
        self._on_commit = on_commit
        """Told of each version's step."""
        self.runs: dict[str, StoredRun] = {}
        self.faults: list[str] = []
        """What happens to the next calls: "unavailable", "lost" (after the commit), a reason in
        capitals, or "" for nothing."""
        self.gate = threading.Event()
        """Calls are answered while it is set."""
        self.gate.set()
        self.seconds = 0.0
        """How long a call takes."""
        self.num_calls = 0
        self._condition = threading.Condition()

    def PublishWeights(
        self, requests: Iterator[weight_pb2.PublishWeightsRequest], context: grpc.ServicerContext
    ) -> weight_pb2.PublishWeightsResponse:
        header = next(requests).header
        chunks = [request.chunk for request in requests]
        assert all(0 < len(chunk) <= 2**20 for chunk in chunks)
        self.num_calls += 1
        self.gate.wait(60)
        time.sleep(self.seconds)
        with self._condition:
            fault = self.faults.pop(0) if self.faults else ""
            if fault == "unavailable":
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            if fault.isupper():
                refuse(context, fault)
            version = self._take(header, b"".join(chunks), context)
        if fault == "lost":
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        return weight_pb2.PublishWeightsResponse(version=version)

    def forget(self, run_id: str) -> None:
        """Lose all weights; numbers that were issued stay used."""
        with self._condition:
            self.runs[run_id] = StoredRun(num_issued=self.runs[run_id].num_issued)

    def _take(
        self, header: weight_pb2.PartHeader, payload: bytes, context: grpc.ServicerContext
    ) -> int:
        run = self.runs.setdefault(header.run_id, StoredRun())
        if run.versions and same(header, run.versions[-1].parts.get(header.part_index)):
            return run.head
        if header.base_version not in (0, run.head):
            refuse(context, "WRONG_BASE")
        if any(key(header) != key(other) for other, _ in run.open.values()):
            refuse(context, "PART_CONFLICT")
        goal = run.num_issued + 1
        run.open[header.part_index] = header, payload
        if len(run.open) == header.num_parts:
            run.versions.append(assembled(run))
            run.num_issued += 1
            run.open = {}
            self._on_commit(header.step)
            self._condition.notify_all()
        elif not self._condition.wait_for(lambda: run.num_issued >= goal, timeout=5):
            run.open = {}
            context.abort(grpc.StatusCode.ABORTED, "discarded")
        return goal


def assembled(run: StoredRun) -> StoredVersion:
    """The version that the run's open parts make, verified."""
    headers = [run.open[index][0] for index in sorted(run.open)]
    slices = [piece for header in headers for piece in header.slices]
    head = run.versions[-1].buffer if run.versions else None
    based = any(header.base_version for header in headers)
    expected: Layout | None = head.layout if head else None
    buffer = HostBuffer(check_slices(slices, expected, based=based))
    if head:
        for entry in buffer.layout:
            buffer.tensor_bytes(entry.name)[:] = head.tensor_bytes(entry.name)
    for header, payload in run.open.values():
        for piece in header.slices:
            body, payload = payload[: piece.num_bytes], payload[piece.num_bytes :]
            apply(piece, np.frombuffer(body, np.uint8), slice_bytes(piece, buffer))
        assert payload == b""
    check_values(slices, buffer, finite=True)
    return StoredVersion(number=run.num_issued + 1, parts=run.open, buffer=buffer)


def key(header: weight_pb2.PartHeader) -> tuple[int, int]:
    return header.epoch, header.step


def same(header: weight_pb2.PartHeader, part: tuple[weight_pb2.PartHeader, bytes] | None) -> bool:
    """Whether a part says what one of the newest version's said."""
    if part is None or key(header) != key(part[0]):
        return False
    return [piece.digest for piece in header.slices] == [piece.digest for piece in part[0].slices]


def refuse(context: grpc.ServicerContext, reason: str) -> NoReturn:
    """Answer FAILED_PRECONDITION with a reason."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="understudy")
    code = grpc.StatusCode.FAILED_PRECONDITION.value[0]
    status = status_pb2.Status(code=code, message=f"refused: {reason}")
    status.details.add().Pack(info)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError


class StoreServer:
    """A store on a port of its own."""

    def __init__(self, store: Store, address: str = "127.0.0.1:0") -> None:
        self.store = store
        # A publication waits in its call for the other ranks' parts.
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        weight_pb2_grpc.add_WeightServiceServicer_to_server(store, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
        self._server.start()

    def close(self) -> None:
        self.store.gate.set()
        self._server.stop(None).wait()
