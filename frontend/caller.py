"""Whose requests these are, as the scheduler is told: it shares the engine out fairly between clients.

A client is an API key; its users, as requests name them, divide what the client gets. Where no keys are asked
for, everybody is one client, and users divide all there is. The scheduler sees hashes only.
"""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import blake2b

_caller: ContextVar[str] = ContextVar("caller", default="")


def identity_of(key: bytes) -> str:
    """What stands for an API key, the same in every frontend."""
    return _hash(key)


def set_caller(identity: str) -> None:
    """Says whose the request is that this task answers; "" where no keys are asked for."""
    _caller.set(identity)


def caller() -> str:
    """Whose request it is that this task answers; the first part of `client_of`."""
    return _caller.get()


def client_of(user: str | None) -> str:
    """The client and the user that the request of this task is of, in the scheduler's form."""
    return f"{_caller.get()}/{_hash(user.encode('utf-8', 'surrogatepass')) if user else ''}"


def _hash(value: bytes) -> str:
    return blake2b(value, digest_size=12, person=b"pagewire client").hexdigest()
