"""A proxy between peers of WeightService that damages what passes through: bytes, not messages."""

import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc

Mischief = Callable[[list[bytes]], list[bytes]]
"""Changes the messages of a stream."""
_FETCH, _PUBLISH = "FetchWeights", "PublishWeights"
_STREAMED = (_FETCH, "WatchVersions", "FetchModelBundle")


def flip(rng: random.Random) -> Mischief:
    """One bit, anywhere in a message."""

    def damage(messages: list[bytes]) -> list[bytes]:
        index = rng.randrange(len(messages))
        changed = bytearray(messages[index])
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return [*messages[:index], bytes(changed), *messages[index + 1 :]]

    return damage


def shorten(rng: random.Random) -> Mischief:
    """The end of a message is missing."""

    def damage(messages: list[bytes]) -> list[bytes]:
        index = rng.randrange(len(messages))
        rest = messages[index][: rng.randrange(len(messages[index]))]
        return [*messages[:index], rest, *messages[index + 1 :]]

    return damage


def end_early(rng: random.Random) -> Mischief:
    """The stream ends in good order, but too early."""
    return lambda messages: messages[: rng.randrange(len(messages))]


def leave_out(rng: random.Random) -> Mischief:
    """A message is missing."""

    def damage(messages: list[bytes]) -> list[bytes]:
        index = rng.randrange(len(messages))
        return messages[:index] + messages[index + 1 :]

    return damage


def repeat(rng: random.Random) -> Mischief:
    """A message comes twice."""

    def damage(messages: list[bytes]) -> list[bytes]:
        index = rng.randrange(len(messages))
        return messages[: index + 1] + messages[index:]

    return damage


def swap(rng: random.Random) -> Mischief:
    """Two different messages change places."""

    def damage(messages: list[bytes]) -> list[bytes]:
        first = rng.randrange(len(messages))
        others = [i for i, message in enumerate(messages) if message != messages[first]]
        second = rng.choice(others)
        changed = list(messages)
        changed[first], changed[second] = changed[second], changed[first]
        return changed

    return damage


KINDS = (flip, shorten, end_early, leave_out, repeat, swap)


class WeightProxy(grpc.GenericRpcHandler):
    """Passes every call on to one address."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.mischief: Mischief | None = None
        """Done to the next fetch or publication, once."""
        self.num_damaged = 0
        self.num_answers_lost = 0
        self.loses_answers = False
        """Publications are passed on, and their answers are not."""

    async def start(self) -> str:
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)
        await self._channel.close()

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        path = details.method
        method = path.rpartition("/")[2]

        async def fetch(request: bytes, context: Any) -> AsyncIterator[bytes]:
            call = self._channel.unary_stream(path)(request)
            if method != _FETCH or self.mischief is None:
                async for message in call:
                    yield message
                return
            for message in self._damage([message async for message in call]):
                yield message

        async def publish(requests: AsyncIterator[bytes], context: Any) -> bytes:
            messages = [message async for message in requests]
            passed = self._damage(messages) if self.mischief else messages
            answer = await _answer(self._channel.stream_unary(path)(iter_of(passed)), context)
            if self.loses_answers:
                self.num_answers_lost += 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
            return answer

        async def ask(request: bytes, context: Any) -> bytes:
            return await _answer(self._channel.unary_unary(path)(request), context)

        if method in _STREAMED:
            return grpc.unary_stream_rpc_method_handler(fetch)
        if method == _PUBLISH:
            return grpc.stream_unary_rpc_method_handler(publish)
        return grpc.unary_unary_rpc_method_handler(ask)

    def _damage(self, messages: list[bytes]) -> list[bytes]:
        assert self.mischief
        mischief, self.mischief = self.mischief, None
        damaged = mischief(messages)
        assert damaged != messages
        self.num_damaged += 1
        return damaged


async def iter_of(messages: Iterable[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def _answer(call: Any, context: Any) -> bytes:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
        await context.abort(error.code(), error.details() or "")
        raise
