"""The certificate that a server shows: it is trusted where any will do, as gRPC always has to trust one."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from typing import Any

CONNECT_SECONDS = 10.0


def shown_certificate(host: str, port: int) -> tuple[bytes, str]:
    """The certificate in PEM, and a name or address that it is for.

    Raises:
        OSError: nobody answers, or the certificate is no good whoever signed it: it has expired.
    """
    certificate = ssl.get_server_certificate((host, port), timeout=CONNECT_SECONDS)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with (
        socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert() or {}
    return certificate.encode(), _name(shown) or host


def _name(shown: Mapping[str, Any]) -> str:
    """The first name of a certificate as `getpeercert` has it; "" if it has none."""
    names = [value for _, value in shown.get("subjectAltName", ())]
    names += [value for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"]
    return str(names[0]).replace("*", "any") if names else ""
