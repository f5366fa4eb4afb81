"""Adapters of an engine without a model: they are read by nobody, and change nothing."""

from __future__ import annotations

from dataclasses import replace

from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.step.runner import AdapterProgress


class NullAdapters:
    """Says that every command is done. Its adapters are only names."""

    def __init__(self) -> None:
        self._facts: dict[int, AdapterFacts] = {}

    @property
    def loaded(self) -> tuple[AdapterFacts, ...]:
        return tuple(self._facts.values())

    def execute(self, command: AdapterCommand) -> AdapterProgress:
        match command.kind:
            case "load":
                self._facts[command.adapter_id] = command.facts
            case "retire":
                self._facts[command.adapter_id] = replace(command.facts, retired=True)
            case "drop":
                self._facts.pop(command.adapter_id, None)
        return AdapterProgress()

    def reset(self) -> None:
        """Nothing is in slots."""
