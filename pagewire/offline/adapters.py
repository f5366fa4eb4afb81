"""The adapters of one program: loaded, put into slots and dropped by its workers, between two steps."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.dispatch.records import StepPlan, StepResult
from pagewire.base.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from scheduler.core import Scheduler
from scheduler.serve.adapters import adapter_plan, identify_adapter

# Between two questions whether an adapter is read.
_POLL_SECONDS = 0.01


class OfflineAdapters:
    """Knows the adapters by name, and what the workers have to do about them. Nothing else is computed while
    one is loaded or dropped; slots are filled while requests run.

    Args:
        core: which says which adapter belongs into which slot.
        num_slots: of the workers; 0 where they take no adapters.
    """

    def __init__(self, core: Scheduler, num_slots: int) -> None:
        self._core, self._num_slots = core, num_slots
        self._by_name: dict[str, AdapterFacts] = {}
        self._by_id: dict[int, AdapterFacts] = {}
        self._commands: deque[AdapterCommand] = deque()
        self._sent: AdapterCommand | None = None

    @property
    def in_flight(self) -> bool:
        """Whether the workers execute a command."""
        return self._sent is not None

    @property
    def names(self) -> tuple[str, ...]:
        """What prompts may be computed with."""
        return tuple(self._by_name)

    def id_of(self, name: str | None) -> int:
        """The id of an adapter; 0 is the model alone.

        Raises:
            NotFound: there is none of this name.
            Unsupported: the workers take no adapters.
        """
        if name is None:
            return 0
        self._require_slots()
        if name not in self._by_name:
            known = ", ".join(map(repr, self._by_name)) or "none"
            raise NotFound(f"there is no adapter {name!r}; there is {known}", param="lora")
        return self._by_name[name].adapter_id

    def begin_load(self, name: str, path: str | Path) -> AdapterFacts:
        """Has the workers read an adapter; `loaded` once no command is left.

        Raises:
            ConfigError: there is no adapter at the path.
            InvalidRequest: the name is taken.
            Unsupported: the workers take no adapters.
        """
        self._require_slots()
        if not name or name in self._by_name:
            what = "is loaded already; unload it first" if name else "is no name"
            raise InvalidRequest(f"the adapter {name!r} {what}", param="lora_name")
        facts = identify_adapter(name, str(path))
        self._by_id[facts.adapter_id] = facts
        self._commands.append(AdapterCommand("load", facts))
        return facts

    def loaded(self, facts: AdapterFacts) -> None:
        """The workers have read it: prompts may name it."""
        self._by_name[facts.name] = facts

    def begin_unload(self, name: str) -> None:
        """Has the workers forget an adapter, which no request uses.

        Raises:
            NotFound, Unsupported: as `id_of`.
        """
        facts = self._by_id.pop(self.id_of(name))
        del self._by_name[name]
        self._core.adapters.dropped(facts.adapter_id)
        self._commands.append(AdapterCommand("drop", facts))

    def _require_slots(self) -> None:
        if not self._num_slots:
            raise Unsupported("this LLM takes no adapters; open it with enable_lora=True", param="lora")

    def next_plan(self) -> StepPlan | None:
        """What the workers are to do next, if anything, and if they do nothing of it now."""
        if self._sent is not None:
            return None
        if not self._commands and (placement := self._core.adapters.next_placement()) is not None:
            adapter_id, slot = placement
            self._commands.append(AdapterCommand("place", self._by_id[adapter_id], slot))
        if not self._commands:
            return None
        self._sent = self._commands.popleft()
        return adapter_plan(self._sent)

    def finished(self, result: StepResult) -> None:
        """Takes the answer to the command in flight.

        Raises:
            InvalidRequest: an adapter does not fit the model.
            Unavailable: one that was loaded cannot be read any more.
        """
        command, self._sent = self._sent, None
        assert command is not None, "an adapter command was answered that was not sent"
        if result.error:
            self._fail(command, result.error)
        elif result.more_ahead:
            if command.kind == "load":
                time.sleep(_POLL_SECONDS)  # the workers read in a thread
            self._commands.appendleft(command)
        elif command.kind == "load":
            self._core.adapters.loaded(command.adapter_id)
        elif command.kind == "place":
            self._core.adapters.placed(command.adapter_id, command.slot)

    def _fail(self, command: AdapterCommand, message: str) -> None:
        if command.kind == "load":
            del self._by_id[command.adapter_id]
            self._commands.append(AdapterCommand("drop", command.facts))
            raise InvalidRequest(message, param="lora_path")
        if command.kind == "place":
            self._core.adapters.not_placed(command.adapter_id)
        raise Unavailable(f"the adapter {command.facts.name!r} is lost: {message}")
