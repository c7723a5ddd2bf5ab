"""A model bundle: files that the learner sends, to be written below one folder.

input: length of the header (2 bytes) | ModelBundleHeader | content of all files
"""

import contextlib
import hashlib
import random
import shutil
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError

from tests.fuzz.mutation import join_parts, mutate_as, mutate_bytes, split_parts
from understudy.client.bundle import BundleError, _check, _write
from understudy.v1 import weight_pb2

MAX_LEN = 1024
_around = Path(tempfile.mkdtemp())
_folder = _around / "bundle"
_NAMES = ("config.json", "../up", f"{_around}/up", "a/b", "..", ".", "", "a\\b", "-", "~", "%2e%2e")
_mutate_header = mutate_as(weight_pb2.ModelBundleHeader)


def seeds() -> list[bytes]:
    """Sound bundles of no, one and two files."""
    files = {"config.json": b"{}", "tokenizer.json": b'{"vocab": 1}'}
    return [_encode(dict(list(files.items())[:number])) for number in range(3)]


def _encode(files: dict[str, bytes]) -> bytes:
    header = weight_pb2.ModelBundleHeader(bundle_digest="d")
    for name, content in files.items():
        digest = hashlib.sha256(content).digest()
        header.files.add(name=name, num_bytes=len(content), digest=digest)
    return join_parts(header.SerializeToString(), b"".join(files.values()))


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the header, a name under right digests, or bytes."""
    rng = random.Random(seed)
    header, content = split_parts(data)
    match rng.randrange(3):
        case 0:
            return mutate_bytes(data, max_size, seed)
        case 1:
            with contextlib.suppress(DecodeError):
                header = _rename(weight_pb2.ModelBundleHeader.FromString(header), content, rng)
        case _:
            header = _mutate_header(header, min(max_size, 2**16 - 1), seed)
    changed = join_parts(header, content)
    return changed if len(changed) <= max_size else mutate_bytes(data, max_size, seed)


def _rename(header: weight_pb2.ModelBundleHeader, content: bytes, rng: random.Random) -> bytes:
    offset = 0
    for file in header.files:
        if rng.random() < 0.5:
            file.name = rng.choice((*_NAMES, rng.choice(_NAMES) + file.name))
        file.digest = hashlib.sha256(content[offset : offset + file.num_bytes]).digest()
        offset += file.num_bytes
    return header.SerializeToString()


def TestOneInput(data: bytes) -> None:
    """Write a bundle; whatever it says, only files of the folder appear."""
    encoded, content = split_parts(data)
    try:
        header = weight_pb2.ModelBundleHeader.FromString(encoded)
    except DecodeError:
        return
    _folder.mkdir(exist_ok=True)
    try:
        with contextlib.suppress(BundleError):
            _check(header)
            _write(header, memoryview(content), _folder)
            written = {path.name for path in _folder.iterdir()}
            assert written == {file.name for file in header.files}
        assert list(_around.iterdir()) == [_folder]
        assert all(path.is_file() for path in _folder.iterdir())
    finally:
        shutil.rmtree(_folder)
