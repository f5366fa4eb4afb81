"""TLS and mTLS for clients over both protocols, and between frontends and a scheduler on another host."""

from __future__ import annotations

import asyncio
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from frontend.config import FrontendConfig
from frontend.scheduler_link import SchedulerLink
from pagewire.base.errors import ConfigError, Unavailable
from pagewire.base.tls import ClientTls
from pagewire.client import AsyncClient
from scheduler.config import SchedulerConfig
from scheduler.serve.server import SchedulerServer
from tests.unit.frontend.certificates import Certificates, write_certificates
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("strangers"))


def trusting(certificates: Certificates, client: Certificates | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates.ca)
    if client is not None:
        context.load_cert_chain(client.client_certfile, client.client_keyfile)
    return context


async def get_models(frontend: RunningFrontend, context: ssl.SSLContext) -> int:
    url = f"https://127.0.0.1:{frontend.http.port}/v1/models"
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
        return response.status


def shown(certificates: Certificates) -> ClientTls:
    return ClientTls(
        ca_certs=certificates.ca,
        certfile=certificates.client_certfile,
        keyfile=certificates.client_keyfile,
    )


async def models(frontend: RunningFrontend, tls: ClientTls | None) -> list[str]:
    async with AsyncClient(frontend.target, tls=tls) as client:
        return [model.id for model in await client.models()]


async def test_both_protocols_speak_tls_and_nothing_else(
    start_frontend: FrontendFactory, certificates: Certificates
) -> None:
    frontend = await start_frontend(ssl_certfile=certificates.certfile, ssl_keyfile=certificates.keyfile)
    assert await get_models(frontend, trusting(certificates)) == 200
    assert await models(frontend, ClientTls(ca_certs=certificates.ca)) == ["bytes"]
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await get_models(frontend, ssl.create_default_context())
    with pytest.raises(aiohttp.ClientError):
        async with aiohttp.ClientSession() as session:
            await session.get(f"{frontend.url}/health")
    with pytest.raises(Unavailable):
        await models(frontend, None)


async def test_with_authorities_clients_must_show_a_certificate_of_one(
    start_frontend: FrontendFactory, certificates: Certificates, strangers: Certificates
) -> None:
    frontend = await start_frontend(
        ssl_certfile=certificates.certfile,
        ssl_keyfile=certificates.keyfile,
        ssl_ca_certs=certificates.ca,
    )
    assert await get_models(frontend, trusting(certificates, certificates)) == 200
    assert await models(frontend, shown(certificates)) == ["bytes"]
    for context in (trusting(certificates), trusting(certificates, strangers)):
        with pytest.raises(aiohttp.ClientError):
            await get_models(frontend, context)
    stranger = ClientTls(
        ca_certs=certificates.ca, certfile=strangers.client_certfile, keyfile=strangers.client_keyfile
    )
    for tls in (ClientTls(ca_certs=certificates.ca), stranger):
        with pytest.raises(Unavailable):
            await models(frontend, tls)


async def test_a_renewed_certificate_is_used_in_the_next_handshake(
    start_frontend: FrontendFactory, tmp_path: Path
) -> None:
    served, renewed = write_certificates(tmp_path / "served"), write_certificates(tmp_path / "renewed")
    frontend = await start_frontend(ssl_certfile=served.certfile, ssl_keyfile=served.keyfile)
    assert await get_models(frontend, trusting(served)) == 200
    served.certfile.write_bytes(renewed.certfile.read_bytes())
    assert await get_models(frontend, trusting(served)) == 200, "the key is still to come"
    served.keyfile.write_bytes(renewed.keyfile.read_bytes())
    assert await get_models(frontend, trusting(renewed)) == 200
    assert await models(frontend, ClientTls(ca_certs=renewed.ca)) == ["bytes"]
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await get_models(frontend, trusting(served))
    with pytest.raises(Unavailable):
        await models(frontend, ClientTls(ca_certs=served.ca))


async def link_connects(port: int, tls: ClientTls | None) -> bool:
    link = SchedulerLink(f"127.0.0.1:{port}", tls=tls)
    connected = asyncio.Event()
    link.on_change(connected.set)
    await link.start()
    try:
        await asyncio.wait_for(connected.wait(), 0.7)
    except TimeoutError:
        return False
    finally:
        await link.stop()
    return True


async def test_frontends_reach_a_scheduler_over_tcp_only_with_its_authoritys_certificate(
    tmp_path: Path, certificates: Certificates, strangers: Certificates, free_port: int
) -> None:
    socket = tmp_path / "scheduler.sock"
    config = SchedulerConfig(
        listen=(f"127.0.0.1:{free_port}", f"unix:{socket}"),
        worker_socket=tmp_path / "worker.sock",
        ssl_certfile=certificates.certfile,
        ssl_keyfile=certificates.keyfile,
        ssl_ca_certs=certificates.ca,
    )
    server = SchedulerServer(config)
    await server.start()
    try:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert await link_connects(free_port, shown(certificates))
        assert not await link_connects(free_port, ClientTls(ca_certs=certificates.ca))
        assert not await link_connects(free_port, shown(strangers))
        assert not await link_connects(free_port, None)
    finally:
        await server.stop()


@pytest.fixture
def free_port(unused_tcp_port_factory: Callable[[], int]) -> int:
    return unused_tcp_port_factory()


def configured(certificates: Certificates, **files: Path | None) -> FrontendConfig:
    given = {"ssl_certfile": certificates.certfile, "ssl_keyfile": certificates.keyfile, **files}
    return FrontendConfig(model="m", scheduler="unix:s", **given)


def test_versions_before_1_2_are_not_spoken(certificates: Certificates) -> None:
    tls = configured(certificates).tls()
    assert tls is not None
    assert tls.reloading().context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_wrong_files_are_named_with_what_is_wrong(
    certificates: Certificates, strangers: Certificates, tmp_path: Path
) -> None:
    text, nowhere = tmp_path / "text.pem", tmp_path / "nowhere.pem"
    text.write_text("text")
    for files, said in (
        ({"ssl_keyfile": strangers.keyfile}, r"server\.key: the key is not that of the certificate"),
        ({"ssl_certfile": nowhere}, r"ssl_certfile is '.*nowhere\.pem': No such file"),
        ({"ssl_keyfile": nowhere}, r"ssl_keyfile is '.*nowhere\.pem': No such file"),
        ({"ssl_certfile": text}, r"text\.pem and .*: not a certificate and its unencrypted private key"),
        ({"ssl_keyfile": None}, r"server\.pem: not a certificate and its unencrypted private key"),
        ({"ssl_ca_certs": text}, r"text\.pem: no certificates in PEM"),
        ({"ssl_certfile": None}, "ssl_keyfile is set, but ssl_certfile is not"),
    ):
        with pytest.raises(ConfigError, match=said):
            configured(certificates, **files).tls()
    assert configured(certificates, ssl_certfile=None, ssl_keyfile=None).tls() is None


def test_a_key_that_needs_a_password_is_refused_without_asking_for_it(
    certificates: Certificates, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(certificates.keyfile.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="unencrypted private key"):
        configured(certificates, ssl_keyfile=locked).tls()
