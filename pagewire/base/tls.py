"""Certificates of servers and clients: read, checked, and read again when their files change.

TLS 1.2 and later, on HTTP by Python's ssl, on gRPC by its own library, whose least is 1.2 too.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a server proves who it is with, and whom it lets in. All files are PEM.

    Attributes:
        certfile: its certificate, with those of intermediate authorities behind it.
        keyfile: the certificate's private key, not encrypted; None if it is in `certfile` too.
        client_ca: authorities; if not None, every client must show a certificate of one of them (mTLS).
        prefix: of the options' names, for errors.
    """

    certfile: Path
    keyfile: Path | None = None
    client_ca: Path | None = None
    prefix: str = "ssl"

    @classmethod
    def of(cls, certfile: Path | None, keyfile: Path | None, client_ca: Path | None) -> ServerTls | None:
        """What the options ask for, checked; None for plain connections.

        Raises:
            ConfigError: a file is missing or wrong, or an option lacks the one that it belongs to.
        """
        if certfile is None:
            for name, value in (("ssl_keyfile", keyfile), ("ssl_ca_certs", client_ca)):
                if value is not None:
                    raise ConfigError(f"{name} is set, but ssl_certfile is not; TLS needs both", param=name)
            return None
        tls = cls(certfile=certfile, keyfile=keyfile, client_ca=client_ca)
        tls.context()
        return tls

    def context(self) -> ssl.SSLContext:
        """A context for servers over Python's ssl.

        Raises:
            ConfigError: a file cannot be read or holds something else, or key and certificate do not match.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_pair(context, self.certfile, self.keyfile, self.prefix)
        if self.client_ca is not None:
            _load_authorities(context, self.client_ca, f"{self.prefix}_ca_certs")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def reloading(self) -> ReloadingTls:
        """The same, following its files. Raises ConfigError as `context`."""
        return ReloadingTls(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """What a client trusts, and what it shows. All files are PEM.

    Attributes:
        ca_certs: authorities that may have signed the server's certificate; None for the usual ones.
        certfile, keyfile: shown to servers that ask for a certificate (mTLS).
        prefix: of the options' names, for errors.
    """

    ca_certs: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    prefix: str = "ssl"

    def credentials(self) -> Any:
        """Credentials for gRPC channels.

        Raises:
            ConfigError: as `ServerTls.context`.
        """
        import grpc

        context = ssl.create_default_context()
        if self.ca_certs is not None:
            _load_authorities(context, self.ca_certs, f"{self.prefix}_ca_certs")
        if self.certfile is None:
            if self.keyfile is not None:
                name = f"{self.prefix}_keyfile"
                raise ConfigError(f"{name} is set, but {self.prefix}_certfile is not", param=name)
            return grpc.ssl_channel_credentials(_bytes(self.ca_certs))
        _load_pair(context, self.certfile, self.keyfile, self.prefix)
        return grpc.ssl_channel_credentials(
            _bytes(self.ca_certs), (self.keyfile or self.certfile).read_bytes(), self.certfile.read_bytes()
        )


class ReloadingTls:
    """A server's TLS whose files are looked at in every handshake: a renewed certificate needs no restart.

    Files that do not fit together (one of two is written already) change nothing until they do. Thread-safe:
    gRPC asks from threads of its own.
    """

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._context = tls.context()
        self._grpc_configuration = self._read_for_grpc()
        self._listening = tls.context()
        self._listening.sni_callback = self._on_handshake

    @property
    def context(self) -> ssl.SSLContext:
        """For a server over Python's ssl: each of its handshakes is made with the files as they are then."""
        return self._listening

    def grpc_credentials(self) -> Any:
        """For a gRPC server, likewise."""
        import grpc

        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration,
            self._fetch,
            require_client_authentication=self._tls.client_ca is not None,
        )

    def _on_handshake(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        with self._lock:
            self._follow()
            connection.context = self._context

    def _fetch(self) -> Any:
        with self._lock:
            self._follow()
            return self._grpc_configuration

    def _follow(self) -> None:
        try:
            signature = self._signature()
            if signature == self._seen:
                return
            self._seen = signature
            context = self._tls.context()
            self._grpc_configuration = self._read_for_grpc()
            self._context = context
        except (ConfigError, OSError) as error:
            logger.warning("the certificate stays what it was: %s", error)
            return
        logger.info("read the certificate %s again", self._tls.certfile)

    def _signature(self) -> tuple[tuple[int, int, int], ...]:
        """What tells whether a file has changed."""
        paths = (self._tls.certfile, self._tls.keyfile, self._tls.client_ca)
        stats = [os.stat(path) for path in paths if path is not None]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _read_for_grpc(self) -> Any:
        import grpc

        tls = self._tls
        pair = ((tls.keyfile or tls.certfile).read_bytes(), tls.certfile.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], _bytes(tls.client_ca))


def _load_pair(context: ssl.SSLContext, certfile: Path, keyfile: Path | None, prefix: str) -> None:
    param = f"{prefix}_certfile"
    _require_readable(certfile, param)
    if keyfile is not None:
        _require_readable(keyfile, f"{prefix}_keyfile")
    try:
        # The password keeps OpenSSL from asking the terminal for one.
        context.load_cert_chain(certfile, keyfile, password=lambda: b"")
    except ssl.SSLError as error:
        pair = str(certfile) if keyfile is None else f"{certfile} and {keyfile}"
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key is not that of the certificate"
        else:
            why = f"not a certificate and its unencrypted private key in PEM ({error.reason or error})"
        raise ConfigError(f"{pair}: {why}", param=param) from error


def _load_authorities(context: ssl.SSLContext, path: Path, param: str) -> None:
    _require_readable(path, param)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path}: no certificates in PEM ({error.reason or error})", param=param) from error


def _require_readable(path: Path, param: str) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ConfigError(f"{param} is {str(path)!r}: {error.strerror}", param=param) from error


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
