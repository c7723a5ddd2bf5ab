"""Channels: one policy for every connection of every role."""

import asyncio
import ipaddress
import logging
import ssl
import time
from pathlib import Path

import grpc

from understudy.config import NetworkConfig
from understudy.errors import ConfigError, PeerUnreachableError

_log = logging.getLogger(__name__)

MEBIBYTE = 2**20
_SAY_FIRST_SECONDS, _SAY_EVERY_SECONDS = 1.0, 10.0

# A hung peer is noticed after keepalive time plus ping timeout (9.5 s); without the ping timeout it
# would take a minute. BDP probing off bounds what a stalled stream buffers to the lookahead.
COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 4_500),
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
    ("grpc.enable_http_proxy", 0),  # http_proxy is not meant for peers, least of all on loopback
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


def check_tls(network: NetworkConfig) -> None:
    """Refuse files that gRPC would take and then fail every handshake with.

    Raises:
        ConfigError: naming the field and the file.
    """
    tls = network.tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cadata=read_pem(tls.ca, "ca").decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"network.tls.ca = '{tls.ca}': no PEM certificate in it") from None
    read_pem(tls.certificate, "certificate")
    read_pem(tls.key, "key")
    assert tls.certificate is not None  # the config sets all three files or none
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"network.tls.certificate = '{tls.certificate}' and network.tls.key = '{tls.key}' "
            f"are not a PEM certificate and its own unencrypted key: {error}"
        ) from None


def _channel_credentials(network: NetworkConfig) -> grpc.ChannelCredentials:
    check_tls(network)
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
    require_secure(address, network, _field(address, network))
    if network.tls.ca:
        credentials = _channel_credentials(network)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def open_sync_channel(address: str, network: NetworkConfig) -> grpc.Channel:
    """Like open_channel, for processes without an event loop (trainer ranks)."""
    require_secure(address, network, _field(address, network))
    if network.tls.ca:
        return grpc.secure_channel(address, _channel_credentials(network), options=CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def _field(address: str, network: NetworkConfig) -> str:
    """Name of the field that an address comes from, for messages."""
    if address == network.learner:
        return "network.learner"
    if address == network.weights:
        return "network.weights"
    if address in network.inference:
        return "network.inference"
    return "network.envservers" if address in network.envservers else "address"


async def wait_ready(channel: grpc.aio.Channel, peer: str, address: str, timeout: float) -> None:
    """Wait until a peer answers, saying so after a second and then every ten.

    Raises:
        PeerUnreachableError: after `timeout` seconds.
    """
    start = time.monotonic()
    patience = _SAY_FIRST_SECONDS
    while (left := start + timeout - time.monotonic()) > 0:
        try:
            await asyncio.wait_for(channel.channel_ready(), min(patience, left))
            return
        except TimeoutError:
            waited = time.monotonic() - start
            _log.warning(
                "waiting for the %s at %s (%.0f of %.0f s)", peer, address, waited, timeout
            )
            patience = _SAY_EVERY_SECONDS
    raise PeerUnreachableError(
        f"the {peer} at {address} did not answer within {timeout:.0f} s; start it, correct the "
        "address or tls under [network], or raise network.connect_timeout_seconds"
    )
