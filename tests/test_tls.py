"""TLS: who may connect, and what is said when files or addresses do not fit."""

import asyncio
import datetime
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from understudy.client import ControlClient, EnvironmentClient
from understudy.config import NetworkConfig, TlsConfig
from understudy.errors import ConfigError, PeerUnreachableError
from understudy.rpc import RoleControl, RoleServer, open_channel, open_sync_channel
from understudy.v1 import control_pb2, control_pb2_grpc

FAR = "192.0.2.1:7000"
"""An address that is nobody's (RFC 5737)."""


@dataclass
class Authority:
    """A certificate authority that writes PEM files into its folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "run")])
        own = self._certify(self._key, self._name, x509.BasicConstraints(ca=True, path_length=0))
        self.ca = self._write("ca.pem", own.public_bytes(serialization.Encoding.PEM))

    def network(self, **fields: float) -> NetworkConfig:
        """A network whose processes share one identity of this authority, for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "role")])
        alternatives = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        certificate = self._certify(key, name, alternatives)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        tls = TlsConfig(
            ca=self.ca,
            certificate=self._write(
                "role.pem", certificate.public_bytes(serialization.Encoding.PEM)
            ),
            key=self._write("role.key", private),
        )
        return NetworkConfig.model_validate({"tls": tls, **fields})

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, name: x509.Name, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The run's authority."""
    return Authority(tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """Somebody else's authority."""
    return Authority(tmp_path / "other")


@asynccontextmanager
async def server(network: NetworkConfig) -> AsyncIterator[str]:
    running = RoleServer("learner", "127.0.0.1:0", network, [], RoleControl("learner"))
    port = await running.bind()
    await running.set_serving()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await running.stop(grace=0.1)


async def test_peers_of_one_authority_talk(authority: Authority) -> None:
    network = authority.network()
    async with server(network) as address:
        async with ControlClient(address, network) as client:
            await client.wait_ready()
            assert (await client.status()).role == "learner"


async def test_the_sync_channel_of_trainer_ranks_talks_too(authority: Authority) -> None:
    network = authority.network()

    def ask(address: str) -> str:
        with open_sync_channel(address, network) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            return str(stub.GetStatus(control_pb2.GetStatusRequest(), timeout=20).role)

    async with server(network) as address:
        assert await asyncio.to_thread(ask, address) == "learner"


async def test_a_peer_of_another_authority_is_refused(
    authority: Authority, other: Authority
) -> None:
    stranger = other.network()
    # It trusts the server, and is still not trusted itself.
    trusting = stranger.tls.model_copy(update={"ca": authority.ca})
    async with server(authority.network()) as address:
        for network in (stranger, stranger.model_copy(update={"tls": trusting})):
            async with ControlClient(address, network) as client:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await client.status()
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_peer_without_a_certificate_is_refused(authority: Authority) -> None:
    async with server(authority.network()) as address:
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetStatus(control_pb2.GetStatusRequest(), timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_plaintext_peer_is_refused_and_told_of_tls(authority: Authority) -> None:
    async with server(authority.network()) as address:
        network = NetworkConfig(connect_timeout_seconds=0.5)
        async with ControlClient(address, network) as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.status()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            with pytest.raises(PeerUnreachableError, match="tls"):
                await client.wait_ready()


async def test_a_tls_peer_refuses_a_plaintext_server(authority: Authority) -> None:
    async with server(NetworkConfig()) as address:
        async with ControlClient(address, authority.network()) as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.status()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


# --- Plaintext beyond this machine ---


async def listen(network: NetworkConfig) -> None:
    await RoleServer("learner", FAR, network, [], RoleControl("learner")).bind()


async def dial(network: NetworkConfig) -> None:
    await open_channel(FAR, network).close()


async def dial_sync(network: NetworkConfig) -> None:
    open_sync_channel(FAR, network).close()


async def test_plaintext_beyond_this_machine_is_refused() -> None:
    network = NetworkConfig(learner=FAR)
    for attempt, field in (
        (listen, "learner.listen"),
        (dial, "network.learner"),
        (dial_sync, "network.learner"),
    ):
        with pytest.raises(ConfigError) as caught:
            await attempt(network)
        said = str(caught.value)
        assert f"{field} = '{FAR}' is not on loopback" in said
        assert "network.tls" in said
        assert "--insecure" in said


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"inference": (FAR,)}, "network.inference"),
        ({"envservers": ("127.0.0.1:7200", FAR)}, "network.envservers"),
        ({}, "address"),
    ],
)
def test_the_field_that_an_address_comes_from_is_named(
    fields: dict[str, tuple[str, ...]], field: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = '{FAR}'"):
        EnvironmentClient(FAR, NetworkConfig.model_validate(fields))


async def test_insecure_allows_plaintext_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    await dial(NetworkConfig(learner=FAR, insecure=True))
    assert f"network.learner = {FAR}: plaintext beyond this machine" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


async def test_tls_allows_any_address(authority: Authority) -> None:
    await dial(authority.network())


# --- Files ---


def spoil(path: Path, fault: str) -> None:
    path.unlink()
    match fault:
        case "a folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "no PEM":
            path.write_bytes(b"\x00\xff nonsense")


@pytest.mark.parametrize("attempt", [dial, dial_sync, listen])
@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
@pytest.mark.parametrize("fault", ["missing", "a folder", "empty", "no PEM"])
async def test_an_unusable_file_is_named(
    authority: Authority,
    field: str,
    fault: str,
    attempt: Callable[[NetworkConfig], Awaitable[None]],
) -> None:
    network = authority.network()
    path: Path = getattr(network.tls, field)
    spoil(path, fault)
    with pytest.raises(ConfigError) as caught:
        await attempt(network)
    assert f"network.tls.{field} = '{path}'" in str(caught.value)


async def test_a_key_that_is_not_the_certificates_is_named(
    authority: Authority, other: Authority
) -> None:
    tls = authority.network().tls.model_copy(update={"key": other.network().tls.key})
    with pytest.raises(ConfigError, match="not a PEM certificate and its own unencrypted key"):
        await listen(NetworkConfig(tls=tls))


async def test_an_encrypted_key_is_named_and_asks_for_no_password(authority: Authority) -> None:
    network = authority.network()
    assert network.tls.key
    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    network.tls.key.write_bytes(encrypted)
    with pytest.raises(ConfigError, match="network.tls.key"):
        await dial(network)
