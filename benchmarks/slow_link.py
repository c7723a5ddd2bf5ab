"""A link of limited speed between two processes of one machine."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_CHUNK_BYTES = 2**14


@contextlib.contextmanager
def slow_link(target: str, mb_per_s: float) -> Iterator[str]:
    """Pass TCP connections on to an address, on a thread; what comes back goes no faster than this.

    Args:
        target: host:port that is listened on.
        mb_per_s: 10^6 bytes a second, of each connection.

    Yields:
        host:port to connect to instead.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        serving = asyncio.run_coroutine_threadsafe(_serve(target, mb_per_s), loop)
        host, port, *_ = serving.result(10).sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _end() -> None:
    """End all connections."""
    passing = asyncio.all_tasks() - {asyncio.current_task()}
    for task in passing:
        task.cancel()
    await asyncio.gather(*passing, return_exceptions=True)


async def _serve(target: str, mb_per_s: float) -> asyncio.Server:
    host, port = target.rsplit(":", 1)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            await asyncio.gather(
                _pass_on(reader, far_writer, 0.0),
                _pass_on(far_reader, writer, 1e-6 / mb_per_s),
            )
        except (OSError, asyncio.CancelledError):
            pass  # one end is gone, or all is to end
        finally:
            writer.close()
            far_writer.close()

    return await asyncio.start_server(connect, "127.0.0.1", 0)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds_per_byte: float
) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        await asyncio.sleep(len(data) * seconds_per_byte)
        writer.write(data)
        await writer.drain()
    writer.close()
