"""A service asked over HTTP; and its metrics, read twice: what happened in between."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pagewire.base.errors import ConfigError, PagewireError, Unauthenticated, Unavailable

TIMEOUT_SECONDS = 5.0
PREFIX = "pagewire:"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What /metrics said.

    Attributes:
        at: when, by `time.monotonic`.
        values: plain samples by name, without the prefix `pagewire:`; labelled ones added up.
        buckets: of each histogram, by its name: how many observations were at most each bound.
        adapters: names of those that requests run with, and of those that requests only wait for; None where
            none are served.
    """

    at: float
    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    adapters: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    @classmethod
    def parse(cls, text: str, at: float) -> Snapshot:
        """From Prometheus' text format. Other metrics than pagewire's are left out.

        Raises:
            ValueError: it is no such text.
        """
        from prometheus_client.parser import text_string_to_metric_families

        values: dict[str, float] = {}
        buckets: dict[str, dict[float, float]] = {}
        adapters: list[Mapping[str, str]] = []
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.startswith(PREFIX):
                    continue
                name = sample.name.removeprefix(PREFIX)
                if name == "lora_requests_info":
                    adapters.append(sample.labels)
                if "le" in sample.labels:
                    bounds = buckets.setdefault(name.removesuffix("_bucket"), {})
                    bound = float(sample.labels["le"])
                    bounds[bound] = bounds.get(bound, 0.0) + sample.value
                else:
                    values[name] = values.get(name, 0.0) + sample.value
        return cls(at, values, buckets, _adapters(adapters) if adapters else None)


def _adapters(replicas: Sequence[Mapping[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adapters in use by all replicas: (those that run, those that only wait)."""
    running, waiting = (
        {name for labels in replicas for name in labels.get(label, "").split(",") if name}
        for label in ("running_lora_adapters", "waiting_lora_adapters")
    )
    return tuple(sorted(running)), tuple(sorted(waiting - running))


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two snapshots. A counter that went down began anew."""

    old: Snapshot
    new: Snapshot

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.new.at - self.old.at

    def now(self, name: str) -> float | None:
        """A gauge's value; None while the scheduler, which has it, cannot be reached."""
        return self.new.values.get(name)

    def grown(self, name: str) -> float:
        """By how much a counter grew."""
        now, before = self.new.values.get(name, 0.0), self.old.values.get(name, 0.0)
        return now - before if now >= before else now

    def rate(self, name: str) -> float:
        """The same a second."""
        return self.grown(name) / self.seconds if self.seconds > 0 else 0.0

    def quantile(self, name: str, share: float) -> float | None:
        """A histogram's quantile, interpolated within its bucket as Prometheus does; None where nothing was
        observed."""
        new, old = self.new.buckets.get(name, {}), self.old.buckets.get(name, {})
        if any(count < old.get(bound, 0.0) for bound, count in new.items()):
            old = {}
        counts = [(bound, count - old.get(bound, 0.0)) for bound, count in sorted(new.items())]
        if not counts or counts[-1][1] <= 0:
            return None
        rank, lower, below = share * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= rank:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
            lower, below = bound, count
        return lower


class Scraper:
    """Asks one service over HTTP.

    Args:
        url: its address, such as http://localhost:8000; http:// may be left out.
        api_key: sent with every request.

    Raises:
        ConfigError: that is no HTTP address.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError(f"{url!r} is no HTTP address; give one such as http://localhost:8000")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._is_https, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/metrics")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def snapshot(self) -> Snapshot:
        """What /metrics says.

        Raises:
            PagewireError: nothing answers, or no pagewire service.
        """
        text = self._get("/metrics")
        try:
            snapshot = Snapshot.parse(text, time.monotonic())
        except ValueError:
            snapshot = Snapshot(0.0, {})
        if not snapshot.values:
            raise PagewireError(f"{self.url} has no metrics of pagewire; is it the service's HTTP address?")
        return snapshot

    def server_info(self) -> dict[str, Any]:
        """What /server_info says: names of the model, device, limits.

        Raises:
            PagewireError: as `snapshot`.
        """
        info: dict[str, Any] = self._parsed("/server_info", self._get("/server_info"))
        return info

    def get_json(self, path: str) -> Any:
        """What a path answers.

        Raises:
            PagewireError: as `snapshot`.
        """
        return self._parsed(path, self._get(path))

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Asks the service to do something.

        Args:
            timeout: seconds until it must have answered.

        Raises:
            PagewireError: it refuses, in its own words; or as `snapshot`.
        """
        status, text = self._ask("POST", path, json.dumps(body).encode(), timeout)
        if status != http.client.OK:
            try:
                message = str(json.loads(text)["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = ""
            raise PagewireError(message or self._strange(path, status))

    def _parsed(self, path: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise PagewireError(f"{self.url}: {path} is no JSON; is it a pagewire service?") from None

    def _get(self, path: str) -> str:
        status, body = self._ask("GET", path, None, TIMEOUT_SECONDS)
        if status != http.client.OK:
            raise PagewireError(self._strange(path, status))
        return body

    def _strange(self, path: str, status: int) -> str:
        return f"{self.url}{path} answers with status {status}; is it a pagewire service?"

    def _ask(self, method: str, path: str, content: bytes | None, timeout: float) -> tuple[int, str]:
        """(status, body) of the answer to a request."""
        connection = self._connection(timeout)
        headers = self._headers | ({} if content is None else {"Content-Type": "application/json"})
        try:
            connection.request(method, self._path + path, body=content, headers=headers)
            response = connection.getresponse()
            body = response.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise PagewireError(
                f"{self.url} does not speak HTTP ({type(error).__name__}); give the service's HTTP address, "
                "which 'pagewire ps' lists"
            ) from error
        except OSError as error:
            raise Unavailable(
                f"nothing answers at {self.url} ({error.strerror or error}); 'pagewire ps' lists what runs "
                "here, and 'pagewire serve MODEL --port PORT' starts a service"
            ) from error
        finally:
            connection.close()
        if response.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            raise Unauthenticated(
                f"{self.url} wants another API key; give it with --api-key or $PAGEWIRE_API_KEY"
            )
        return response.status, body

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._is_https:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
