"""Channels: one policy for every connection of every role."""

import asyncio
import ipaddress
import logging
import time
from pathlib import Path

import grpc

from understudy.config import NetworkConfig
from understudy.errors import ConfigError, PeerUnreachableError

_log = logging.getLogger(__name__)

MEBIBYTE = 2**20

# A hung peer is noticed after keepalive time plus ping timeout (10 s); without the ping timeout it
# would take a minute. BDP probing off bounds what a stalled stream buffers to the lookahead.
COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MEBIBYTE),
)
CHANNEL_OPTIONS = (
    *COMMON_OPTIONS,
    ("grpc.max_receive_message_length", 64 * MEBIBYTE),
    ("grpc.max_send_message_length", 64 * MEBIBYTE),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def is_local(address: str) -> bool:
    """Whether an address cannot be reached from another machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_secure(address: str, network: NetworkConfig, field: str) -> None:
    """Refuse plaintext beyond this machine unless the user asked for it.

    Raises:
        ConfigError: naming the field, the address and both remedies.
    """
    if network.tls.ca or is_local(address):
        return
    if not network.insecure:
        raise ConfigError(
            f"{field} = {address!r} is not on loopback and network.tls is not set; set ca, "
            "certificate and key there, or pass --insecure to send plaintext"
        )
    _log.warning("%s = %s: plaintext beyond this machine (insecure)", field, address)


def read_pem(path: Path | None, field: str) -> bytes:
    """Read one PEM file. Raises ConfigError naming the field and the file."""
    assert path is not None  # the config sets all three files or none
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"network.tls.{field} = '{path}': {error.strerror}") from None


def _channel_credentials(network: NetworkConfig) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem(network.tls.ca, "ca"),
        private_key=read_pem(network.tls.key, "key"),
        certificate_chain=read_pem(network.tls.certificate, "certificate"),
    )


def open_channel(address: str, network: NetworkConfig) -> grpc.aio.Channel:
    """Open the one channel to a peer; it connects lazily and reconnects by itself.

    Raises:
        ConfigError: for plaintext beyond this machine, or TLS files that cannot be read.
    """
    require_secure(address, network, "address")
    if network.tls.ca:
        credentials = _channel_credentials(network)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def open_sync_channel(address: str, network: NetworkConfig) -> grpc.Channel:
    """Like open_channel, for processes without an event loop (trainer ranks)."""
    require_secure(address, network, "address")
    if network.tls.ca:
        return grpc.secure_channel(address, _channel_credentials(network), options=CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


async def wait_ready(channel: grpc.aio.Channel, peer: str, address: str, timeout: float) -> None:
    """Wait until a peer answers, saying so every ten seconds.

    Raises:
        PeerUnreachableError: after `timeout` seconds.
    """
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        try:
            await asyncio.wait_for(channel.channel_ready(), min(10.0, timeout - waited))
            return
        except TimeoutError:
            _log.warning("waiting for the %s at %s (%.0f s)", peer, address, waited)
    raise PeerUnreachableError(
        f"the {peer} at {address} did not answer within {timeout:.0f} s; start it, correct the "
        "address under [network], or raise network.connect_timeout_seconds"
    )
