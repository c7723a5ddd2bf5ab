"""Model bundles: what arrives is what the header says, below one folder, or nothing is used."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conftest import serving
from understudy.client import fetch_model_bundle
from understudy.client.bundle import BundleError
from understudy.config import NetworkConfig
from understudy.rpc import Service, open_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc

Files = list[tuple[str, bytes]]


class Bundles(weight_pb2_grpc.WeightServiceServicer):
    """Sends a bundle whose header can lie."""

    def __init__(self, files: Files, sent: bytes | None = None) -> None:
        self.files = files
        self.sent = b"".join(content for _, content in files) if sent is None else sent

    async def FetchModelBundle(
        self, request: weight_pb2.FetchModelBundleRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchModelBundleResponse]:
        files = [
            weight_pb2.BundleFile(
                name=name, num_bytes=len(content), digest=hashlib.sha256(content).digest()
            )
            for name, content in self.files
        ]
        header = weight_pb2.ModelBundleHeader(bundle_digest="d", files=files)
        yield weight_pb2.FetchModelBundleResponse(header=header)
        for start in range(0, len(self.sent), 7):
            yield weight_pb2.FetchModelBundleResponse(chunk=self.sent[start : start + 7])


async def fetch(bundles: Bundles, folder: Path) -> str:
    """Fetch what a server of these bundles sends."""
    service = Service(
        name="understudy.v1.WeightService",
        add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
        servicer=bundles,
    )
    async with serving(service, role="learner") as address:
        channel = open_channel(address, NetworkConfig())
        try:
            return await fetch_model_bundle(channel, folder)
        finally:
            await channel.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_bundle_arrives_file_by_file(tmp_path: Path) -> None:
    files = [("config.json", b"{}"), ("empty", b""), ("tokenizer.json", b"x" * 100)]
    assert await fetch(Bundles(files), tmp_path) == "d"
    assert contents(tmp_path) == dict(files)


@pytest.mark.parametrize(
    ("files", "sent", "said"),
    [
        ([("../escape", b"a")], None, "no plain file name"),
        ([("/etc/passwd", b"a")], None, "no plain file name"),
        ([("", b"a")], None, "no plain file name"),
        ([("a", b"1"), ("a", b"2")], None, "occurs twice"),
        ([("a", b"12")], b"13", "not what its digest says"),
        ([("a", b"12")], b"1", "not what its digest says"),
        ([("a", b"12")], b"123", "1 bytes belong to no file"),
    ],
)
async def test_a_bundle_that_lies_is_refused(
    tmp_path: Path, files: Files, sent: bytes | None, said: str
) -> None:
    with pytest.raises(BundleError, match=said):
        await fetch(Bundles(files, sent), tmp_path)
