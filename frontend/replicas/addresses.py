"""Where the schedulers are: a list of addresses, a name in DNS that stands for all of its, or a file."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)

DNS, FILE = "dns:", "file:"
RESOLVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where one scheduler is.

    Attributes:
        target: for gRPC.
        name: what people and metrics call it: its place in the list, or its address if it came from DNS.
        host: the name that its certificate must be for, if it is not in `target`.
    """

    target: str
    name: str
    host: str = ""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What `--schedulers` says.

    Attributes:
        listed: addresses that were named.
        names: (host, port) of names in DNS.
        files: with an address a line; whoever writes one replaces it whole.
    """

    listed: tuple[Address, ...]
    names: tuple[tuple[str, int], ...]
    files: tuple[Path, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Addresses:
        """From addresses with commas between them.

        Raises:
            ConfigError: one is none, or is there twice.
        """
        entries = [entry.strip() for entry in text.split(",")]
        if not all(entries) or len(set(entries)) != len(entries):
            raise ConfigError(
                f"scheduler is {text!r}; it must be unix:/PATH, HOST:PORT, dns:NAME:PORT or file:/PATH, or "
                "several different ones with commas between them",
                param="scheduler",
            )
        listed = [entry for entry in entries if not entry.startswith((DNS, FILE))]
        return cls(
            tuple(Address(target, str(number)) for number, target in enumerate(listed)),
            tuple(_name(entry) for entry in entries if entry.startswith(DNS)),
            tuple(Path(entry.removeprefix(FILE)) for entry in entries if entry.startswith(FILE)),
        )

    @property
    def is_single(self) -> bool:
        """Whether there is one scheduler and will never be another."""
        return len(self.listed) == 1 and not self.are_looked_up

    @property
    def are_looked_up(self) -> bool:
        """Whether they may change."""
        return bool(self.names or self.files)

    async def resolve(self) -> list[Address] | None:
        """All addresses now, those listed first. None if DNS or a file does not tell."""
        found = list(self.listed)
        loop = asyncio.get_running_loop()
        for host, port in self.names:
            try:
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                logger.warning("%s cannot be resolved: %s", host, error)
                return None
            for address in sorted({str(info[4][0]) for info in infos}):
                target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
                found.append(Address(target, target, host))
        for path in self.files:
            try:
                lines = path.read_text().split()
            except OSError as error:
                logger.warning("%s cannot be read: %s", path, error.strerror)
                return None
            found += [Address(target, target) for target in dict.fromkeys(lines)]
        return found


def _name(entry: str) -> tuple[str, int]:
    host, _, port = entry.removeprefix(DNS).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"scheduler has {entry!r}; it must be dns:NAME:PORT", param="scheduler")
    return host, int(port)
