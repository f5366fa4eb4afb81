"""TCP ports that a service keeps for itself while its frontends come and go."""

from __future__ import annotations

import errno
import socket

from pagewire.base.errors import ConfigError


class ReservedPort:
    """A port held by a bound socket that never listens, so that no other user's process can take it.

    Frontends bind the same port with SO_REUSEPORT; connections go only to sockets that listen.

    Args:
        host: address to bind.
        port: the port; 0 takes a free one.
        what: the option's name, for errors.

    Raises:
        ConfigError: the address is unknown, or another process has the port.
    """

    def __init__(self, host: str, port: int, what: str) -> None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except socket.gaierror as error:
            raise ConfigError(f"host {host!r} is not an address: {error.strerror}", param="host") from error
        if port != 0:
            _check_free(family, kind, protocol, address, what)
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind(address)
        except OSError as error:
            self._socket.close()
            raise _refusal(error, address, what) from error
        self.port: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Lets the port go."""
        self._socket.close()


def _check_free(family: int, kind: int, protocol: int, address: tuple[object, ...], what: str) -> None:
    """Raises unless the port can be bound alone. SO_REUSEADDR looks past connections of an earlier run
    that are still closing, not past a socket that listens."""
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise _refusal(error, address, what) from error


def _refusal(error: OSError, address: tuple[object, ...], what: str) -> ConfigError:
    host, port = address[:2]
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"{what} {port} on {host} is in use by another process; choose another --{what}, or 0 for a free "
            "one",
            param=what,
        )
    return ConfigError(f"{what} {port} on {host} cannot be bound: {error.strerror}", param=what)
