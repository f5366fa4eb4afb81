"""Certificates made on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """An authority, a server of this host and a client. All files are PEM."""

    ca: Path
    certfile: Path
    keyfile: Path
    client_certfile: Path
    client_keyfile: Path


def write_certificates(directory: Path) -> Certificates:
    """Writes them into an empty directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    for name, names in (("server", ("localhost", "127.0.0.1")), ("client", ("a-client@example.org",))):
        issued = authority.issue_cert(*names)
        issued.private_key_pem.write_to_path(str(directory / f"{name}.key"))
        (directory / f"{name}.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    files = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return Certificates(*(directory / name for name in files))
