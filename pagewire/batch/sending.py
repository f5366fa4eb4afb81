"""Requests over HTTP that are sent again while the server is away or full."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from pagewire.base.errors import ConfigError, Unauthenticated, Unavailable

_AGAIN = (429, 502, 503, 504)
"""Statuses of a server that is full, or away behind a proxy: the same request succeeds later."""
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server answered: the status, the request's id in its logs, and the body, JSON or else text."""

    status: int
    request_id: str
    body: Any


class Sender:
    """Posts JSON to a server. Use it as an asynchronous context manager.

    Args:
        base_url: the server's, such as http://localhost:8000.
        api_key: sent with every request.
        concurrency: how many connections there may be.
        patience: seconds for which a request is sent again before the server is given up.
    """

    def __init__(self, base_url: str, api_key: str | None, *, concurrency: int, patience: float) -> None:
        self._base_url, self._patience = base_url, patience
        self._concurrency = concurrency
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def __aenter__(self) -> Sender:
        self._session = aiohttp.ClientSession(
            headers={**self._headers, "Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def find(self) -> None:
        """Looks whether there is a server at all, and whether it takes the key.

        Raises:
            ConfigError: there is none, or it does not.
        """
        try:
            async with self._session.get(f"{self._base_url}/v1/models") as response:
                if response.status == 401:
                    why = _message(await response.text())
                    raise ConfigError(
                        f"the server at {self._base_url}: {why}; --api-key or $PAGEWIRE_API_KEY gives its key"
                    )
        except aiohttp.ClientConnectionError as error:
            raise ConfigError(
                f"no server answers at {self._base_url} ({error}); `pagewire serve MODEL` starts one"
            ) from error

    async def send(self, path: str, body: Mapping[str, Any]) -> Answered:
        """The answer to a request.

        Raises:
            Unavailable: the server was away or full for longer than the patience.
            Unauthenticated: it wants another key; so it would for every request.
        """
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        deadline = time.monotonic() + self._patience
        wait = _FIRST_WAIT
        while True:
            asked_wait = 0.0
            try:
                async with self._session.post(self._base_url + path, data=data) as response:
                    text = await response.text(errors="replace")
                    if response.status not in _AGAIN:
                        return _answer(response, text)
                    why = f"it answered {response.status}: {_message(text)}"
                    asked_wait = _seconds(response.headers.get("Retry-After"))
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                why = str(error)
            seconds = max(wait * random.uniform(0.8, 1.2), asked_wait)
            if time.monotonic() + seconds > deadline:
                raise Unavailable(
                    f"the server at {self._base_url} did not take a request for {self._patience:g} s: {why}"
                )
            await asyncio.sleep(seconds)
            wait = min(2 * wait, _LONGEST_WAIT)


def _answer(response: aiohttp.ClientResponse, text: str) -> Answered:
    if response.status == 401:
        raise Unauthenticated(_message(text))
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    return Answered(response.status, response.headers.get("x-request-id", ""), body)


def _message(text: str) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].strip() or "nothing"


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; those that give a date are not obeyed."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
