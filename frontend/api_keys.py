"""Checks the key that a request carries."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from pagewire.errors import Unauthenticated


class ApiKeys:
    """The keys that are accepted; with none configured every request is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, authorization: str | None, x_api_key: str | None) -> None:
        """Looks at the values of the two headers (or metadata entries) that may carry a key.

        Raises:
            Unauthenticated: there is no key, or it is not one of those accepted.
        """
        if not self._keys:
            return
        given = x_api_key or ""
        if authorization is not None and authorization[:7].lower() == "bearer ":
            given = authorization[7:].strip()
        if not given:
            raise Unauthenticated(
                "an API key is required: send it as 'authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        # Every key is compared, each in constant time, so that the time taken tells nothing about them.
        encoded = given.encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(encoded, key) for key in self._keys]
        if not any(matches):
            raise Unauthenticated("the API key is wrong")
