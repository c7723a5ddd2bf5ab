"""What all clients share: a channel of their own, closed with them."""

import asyncio
from collections.abc import Sequence
from typing import Self

import grpc

from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.rpc import open_channel, wait_ready


class Client:
    """A client of one service at one address. Close it, or use it as an async context manager."""

    peer = "peer"
    """What the peer is called in messages."""

    def __init__(self, address: str, network: NetworkConfig) -> None:
        self.address = address
        self.network = network
        self.channel: grpc.aio.Channel = open_channel(address, network)

    @classmethod
    def connect(cls, address: str, network: NetworkConfig | None = None) -> Self:
        """Make a client; it connects at its first call."""
        return cls(address, network or NetworkConfig())

    async def wait_ready(self) -> None:
        """Wait until the peer answers.

        Raises:
            PeerUnreachableError: after network.connect_timeout_seconds.
        """
        await wait_ready(
            self.channel, self.peer, self.address, self.network.connect_timeout_seconds
        )

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


async def wait_any_ready(clients: Sequence[Client]) -> None:
    """Wait until one of several peers answers.

    Raises:
        PeerUnreachableError: none did within network.connect_timeout_seconds; names the last.
    """
    waits = [asyncio.create_task(client.wait_ready()) for client in clients]
    try:
        failure: PeerUnreachableError | None = None
        for wait in asyncio.as_completed(waits):
            try:
                return await wait
            except PeerUnreachableError as error:
                failure = error
        if failure:
            raise failure
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
