"""zstd contexts, one a thread: two threads in one context end the process with a segmentation
fault, and making one for every call takes ten times as long as compressing something small."""

import threading

import zstandard

MAX_WINDOW_BYTES = 2**27


class Contexts(threading.local):
    """This thread's compressor and decompressor.

    Args:
        level: of compression.
        checksum: whether frames that are written end with a checksum.
    """

    def __init__(self, level: int, *, checksum: bool) -> None:
        self.compressor = zstandard.ZstdCompressor(
            level=level, write_content_size=True, write_checksum=checksum
        )
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
