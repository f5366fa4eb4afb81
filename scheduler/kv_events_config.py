"""What `--kv-events-config` says, in the form that vLLM has for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pagewire.base.errors import ConfigError

PARAM = "kv_events_config"
PUBLISHERS = ("null", "zmq")
ENCODINGS = ("array", "map")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEventsConfig:
    """Where and how KV events are published.

    Attributes:
        enable_kv_cache_events: whether there are any.
        publisher: "zmq", or "null" for none.
        endpoint: ZMQ address of the PUB socket: bound if it has a *, or is ipc or inproc, else connected to.
            A replica adds its number to the port.
        replay_endpoint: of the ROUTER socket that sends batches again, the same way; None for none.
        buffer_steps: batches that are kept to be sent again.
        hwm: messages that ZMQ keeps for a slow subscriber before it drops them.
        max_queue_size: batches that wait to be published before they are dropped, which leaves a gap in the
            sequence numbers.
        topic: what subscribers subscribe to.
        encoding: "array", as subscribers of vLLM's releases read, or "map" with the fields' names.
    """

    enable_kv_cache_events: bool = False
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    encoding: str = "array"

    @property
    def is_on(self) -> bool:
        """Whether events are published."""
        return self.enable_kv_cache_events and self.publisher == "zmq"

    @classmethod
    def parse(cls, text: str) -> KvEventsConfig:
        """From a JSON object.

        Raises:
            ConfigError: it is none, a value is wrong, or the packages are not installed.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{PARAM} is no JSON: {error}", param=PARAM) from None
        if not isinstance(values, dict):
            raise ConfigError(f"{PARAM} is {text}; it must be a JSON object", param=PARAM)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                raise ConfigError(f"{PARAM} has {name!r}; there are {', '.join(fields)}", param=PARAM)
            _check(name, value)
        config = cls(**values)
        if config.is_on and not (find_spec("zmq") and find_spec("msgpack")):
            raise ConfigError(
                f"{PARAM} needs the packages pyzmq and msgpack; install them with: pip install "
                "'pagewire[kv-events]'",
                param=PARAM,
            )
        return config


def _check(name: str, value: Any) -> None:
    if name == "enable_kv_cache_events":
        ok, allowed = isinstance(value, bool), "true or false"
    elif name in ("buffer_steps", "hwm", "max_queue_size"):
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        allowed = "a number from 0 on"
    elif name in ("publisher", "encoding"):
        choices = PUBLISHERS if name == "publisher" else ENCODINGS
        ok, allowed = value in choices, f"one of {', '.join(choices)}"
    elif name == "topic":
        ok, allowed = isinstance(value, str), "a text"
    else:
        ok = (value is None and name == "replay_endpoint") or _is_endpoint(value)
        allowed = "an address such as tcp://*:5557, ipc:///run/kv-events or inproc://kv-events"
    if not ok:
        raise ConfigError(f"{PARAM}: {name} is {value!r}; it must be {allowed}", param=PARAM)


def _is_endpoint(value: object) -> bool:
    if not isinstance(value, str):
        return False
    if value.startswith("tcp://"):
        return value.rpartition(":")[2].isdecimal()
    return value.startswith(("ipc://", "inproc://"))


def of_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a replica: its number is added to the port, or else to the name."""
    if rank == 0:
        return endpoint
    if endpoint.startswith("tcp://"):
        host, _, port = endpoint.rpartition(":")
        return f"{host}:{int(port) + rank}"
    return f"{endpoint}_dp{rank}"
