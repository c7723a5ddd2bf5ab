"""Fetches a model bundle (configuration, tokenizer, chat template) from whoever has it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import grpc

from understudy.errors import UnderstudyError
from understudy.v1 import weight_pb2, weight_pb2_grpc

MAX_BUNDLE_BYTES = 256 * 2**20
"""Far above any tokenizer and configuration; weights travel by FetchWeights."""


MAX_NAME_BYTES = 255
"""Of a file's name, as Linux has it."""


class BundleError(UnderstudyError):
    """A bundle that breaks its own header: bad name, size or digest."""


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A bundle in memory."""

    header: weight_pb2.ModelBundleHeader
    content: bytes
    """All files, one behind the other."""

    @property
    def digest(self) -> str:
        """Digest over all names and files."""
        return self.header.bundle_digest

    def write(self, folder: Path) -> None:
        """Write the files. Raises BundleError: content that is not what the header says."""
        _write(self.header, memoryview(self.content), folder)


async def read_model_bundle(channel: grpc.aio.Channel, timeout: float = 60.0) -> ModelBundle:
    """Fetch a model bundle into memory.

    Raises:
        BundleError: a file name with a separator, or more bytes than any bundle has.
        grpc.aio.AioRpcError: the peer did not answer, or has no bundle.
    """
    stub = weight_pb2_grpc.WeightServiceStub(channel)
    stream = stub.FetchModelBundle(weight_pb2.FetchModelBundleRequest(), timeout=timeout)
    header = weight_pb2.ModelBundleHeader()
    content = bytearray()
    async for response in stream:
        if response.HasField("header"):
            header = response.header
            _check(header)
        else:
            content += response.chunk
            if len(content) > MAX_BUNDLE_BYTES:
                raise BundleError(f"model bundle: more than {MAX_BUNDLE_BYTES} bytes came")
    return ModelBundle(header=header, content=bytes(content))


async def fetch_model_bundle(channel: grpc.aio.Channel, folder: Path, timeout: float = 60.0) -> str:
    """Write the learner's model bundle into a folder and return its digest.

    Raises:
        BundleError: a file name with a separator, or content that is not what the header says.
        grpc.aio.AioRpcError: the learner did not answer.
    """
    bundle = await read_model_bundle(channel, timeout)
    bundle.write(folder)
    return bundle.digest


def _check(header: weight_pb2.ModelBundleHeader) -> None:
    names = [file.name for file in header.files]
    if len(set(names)) != len(names):
        raise BundleError("model bundle: a file name occurs twice")
    for name in names:
        plain = name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
        if not plain or len(name.encode()) > MAX_NAME_BYTES:
            raise BundleError(f"model bundle: {name!r} is no plain file name")


def _write(header: weight_pb2.ModelBundleHeader, content: memoryview, folder: Path) -> None:
    offset = 0
    for file in header.files:
        piece = content[offset : offset + file.num_bytes]
        offset += file.num_bytes
        if len(piece) != file.num_bytes or hashlib.sha256(piece).digest() != file.digest:
            raise BundleError(f"model bundle: {file.name!r} is not what its digest says")
        (folder / file.name).write_bytes(piece)
    if offset != len(content):
        raise BundleError(f"model bundle: {len(content) - offset} bytes belong to no file")
