"""A whole service with TLS: it becomes ready, and says only what it should."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pagewire.base.tls import ClientTls
from pagewire.client import Client
from tests.unit.frontend.certificates import Certificates, write_certificates
from tools.service import Service

API_KEY = "sesame-4711-open"
SECRET = "my-secret-is-swordfish"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


class SecureService(Service):
    """A service that only clients with a certificate reach."""

    def __init__(self, directory: Path, certificates: Certificates) -> None:
        self.context = ssl.create_default_context(cafile=certificates.ca)
        self.context.load_cert_chain(certificates.client_certfile, certificates.client_keyfile)
        files = {
            "certfile": certificates.certfile,
            "keyfile": certificates.keyfile,
            "ca-certs": certificates.ca,
        }
        options = [part for name, path in files.items() for part in (f"--ssl-{name}", str(path))]
        super().__init__(
            directory,
            options=("--engine", "null", "--enable-log-requests", *options),
            environment={"PAGEWIRE_API_KEY": API_KEY},
        )
        self.http_url = self.http_url.replace("http:", "https:")

    def wait_ready(self) -> Service:
        """Returns when the supervisor says that it serves, which it found out by itself."""
        import time

        deadline = time.monotonic() + 60
        while "ready after" not in self.log.partition("Ctrl-C stops it")[0] or "Ctrl-C" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        return self


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[SecureService]:
    with SecureService(tmp_path_factory.mktemp("tls"), certificates) as service:
        assert isinstance(service, SecureService)
        yield service


def test_a_service_with_mtls_serves_those_who_show_a_certificate(
    service: SecureService, certificates: Certificates
) -> None:
    body = {"model": service.model, "prompt": SECRET, "max_tokens": 3}
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx.Client(verify=service.context, headers=headers) as client:
        assert client.post(f"{service.http_url}/v1/completions", json=body).status_code == 200
    shown = ClientTls(
        ca_certs=certificates.ca,
        certfile=certificates.client_certfile,
        keyfile=certificates.client_keyfile,
    )
    with Client(service.grpc_target, api_key=API_KEY, tls=shown) as grpc_client:
        assert grpc_client.generate(SECRET, {"max_tokens": 3}).token_ids
    with httpx.Client(verify=ssl.create_default_context(cafile=certificates.ca)) as client:
        with pytest.raises(httpx.HTTPError):
            client.get(f"{service.http_url}/health")


def test_what_clients_send_in_confidence_is_in_no_log(service: SecureService) -> None:
    with httpx.Client(verify=service.context) as client:
        for key, body in (
            (API_KEY, {"prompt": SECRET, "max_tokens": -1}),
            (API_KEY, {"prompt": SECRET, "unknown": SECRET}),
            (API_KEY, {"messages": [{"role": SECRET, "content": SECRET}]}),
            (f"wrong-{SECRET}", {"prompt": SECRET}),
        ):
            for path in ("/v1/completions", "/v1/chat/completions"):
                url = f"{service.http_url}{path}?key={SECRET}"
                answer = client.post(url, json=body, headers={"x-api-key": key, "x-note": SECRET})
                assert answer.status_code in (400, 401), answer.text
    assert "request " in service.log, "requests are logged"
    assert service.log.count(API_KEY) == 0
    assert service.log.count(SECRET) == 0
    for process in service.processes().values():
        assert API_KEY not in " ".join(process.cmdline()), "any user can read the list of processes"
