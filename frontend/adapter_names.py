"""The adapters that requests may name as their model, as the scheduler tells of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pagewire.scheduler.v1 import scheduler_pb2


class AdapterNames:
    """Adapters by name. What the scheduler tells last holds."""

    def __init__(self) -> None:
        self._adapters: Mapping[str, scheduler_pb2.Adapter] = {}

    def learn(self, adapters: Iterable[scheduler_pb2.Adapter]) -> None:
        """Takes the adapters that are served from now on."""
        self._adapters = {adapter.name: adapter for adapter in adapters}

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def get(self, name: str) -> scheduler_pb2.Adapter | None:
        """An adapter; None if none has the name."""
        return self._adapters.get(name)

    def id_of(self, name: str) -> int:
        """What the scheduler calls an adapter; 0, the base model, for any other name."""
        adapter = self._adapters.get(name)
        return 0 if adapter is None else adapter.adapter_id
