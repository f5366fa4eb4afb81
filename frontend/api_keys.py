"""Checks the key that a request carries."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from frontend.caller import identity_of
from pagewire.base.errors import ConfigError, Unauthenticated


class ApiKeys:
    """The keys that are accepted; with none configured every request is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def load(cls, keys: Sequence[str], file: Path | None) -> ApiKeys:
        """The keys given and those of a file.

        Raises:
            ConfigError: the file cannot be read, has no key at all, or a line of it has white space inside.
        """
        return cls([*keys, *(_keys_of(file) if file is not None else ())])

    def check(self, authorization: str | None, x_api_key: str | None) -> str:
        """Looks at the values of the two headers (or metadata entries) that may carry a key.

        Returns:
            Whose the request is: what stands for its key, or "" if none is asked for.

        Raises:
            Unauthenticated: there is no key, or it is not one of those accepted.
        """
        if not self._digests:
            return ""
        given = x_api_key or ""
        if authorization is not None and authorization[:7].lower() == "bearer ":
            given = authorization[7:].strip()
        if not given:
            raise Unauthenticated(
                "an API key is required: send it as 'authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        # Every key is compared, each in constant time, and digests are, which are all of one length: so the
        # time taken tells nothing about the keys, not even how long they are.
        encoded = given.encode("utf-8", "surrogateescape")
        digest = _digest(encoded)
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        if not any(matches):
            raise Unauthenticated("the API key is wrong")
        return identity_of(encoded)


def admin_keys(keys: Sequence[str], others: ApiKeys) -> ApiKeys:
    """The keys for what changes the service: `keys`, or, where there are none, those that all requests
    need."""
    return ApiKeys(keys) if keys else others


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys_of(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}", param="api_key_file") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        # Without any key every request would be let in, which nobody means who names a file of them.
        raise ConfigError(f"{file}: has no key in it; write one a line", param="api_key_file")
    for number, line in enumerate(lines, start=1):
        if line in keys and len(line.split()) > 1:
            raise ConfigError(f"{file}: line {number} has white space in a key", param="api_key_file")
    return keys
