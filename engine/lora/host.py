"""The adapters of one worker: read in a thread, kept in host memory, copied into slots between steps.

A scheduler commands what is done (engine/dispatch/adapters.py), the same to every rank. A command that takes
long is sent again and again until its answer says that nothing is left to do; each time a piece of the work
is done, so that no step waits for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.lora.fit import FittedAdapter, mapped_tensors
from engine.lora.reader import read_adapter
from engine.lora.slots import AdapterSlots
from engine.step.runner import AdapterProgress
from pagewire.base.errors import ConfigError, PagewireError
from pagewire.hub.adapters import adapter_digest

logger = logging.getLogger(__name__)

# A piece of copying lasts no longer than about this.
PIECE_SECONDS = 0.002


class _Reading:
    """An adapter that a thread reads. `result` is there once `done` is set."""

    def __init__(self, read: Callable[[], FittedAdapter]) -> None:
        self.done = threading.Event()
        self.result: FittedAdapter | None = None
        self.error = ""
        self._read = read
        threading.Thread(target=self._run, name="adapter-reader", daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._read()
        except PagewireError as error:
            self.error = error.message
        except (MemoryError, OSError, RuntimeError, ValueError) as error:
            logger.exception("an adapter cannot be read")
            self.error = f"the adapter cannot be read: {type(error).__name__}: {error}"
        self.done.set()


class AdapterHost:
    """Executes adapter commands. All but the reading happens in the thread that runs steps.

    Args:
        slots: the device's memory.
        max_rank: of any adapter.
        max_kept: adapters in host memory. Of more, those least recently used are read again when they are
            placed.
        pin: whether host memory is pinned for copies to the device.
        finish: returns whether the copies that were started are over; waits for none.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        *,
        max_rank: int,
        max_kept: int,
        pin: bool = False,
        finish: Callable[[], bool] = lambda: True,
    ) -> None:
        self.slots = slots
        self._max_rank, self._max_kept, self._pin, self._finish = max_rank, max_kept, pin, finish
        self._facts: dict[int, AdapterFacts] = {}
        self._kept: OrderedDict[int, FittedAdapter] = OrderedDict()
        self._reading: dict[int, _Reading] = {}
        self._placing: tuple[AdapterCommand, Iterator[None]] | None = None
        self._slot_of: dict[int, int] = {}

    @property
    def loaded(self) -> tuple[AdapterFacts, ...]:
        """The adapters that were loaded, in this order, and not dropped."""
        return tuple(self._facts.values())

    @property
    def num_kept_bytes(self) -> int:
        """Of host memory."""
        return sum(each.num_bytes for each in self._kept.values())

    def execute(self, command: AdapterCommand) -> AdapterProgress:
        """Does a piece of a command's work. Never raises: an error is in the answer."""
        try:
            match command.kind:
                case "load":
                    return self._load(command)
                case "place":
                    return self._place(command)
                case "retire":
                    if command.adapter_id in self._facts:
                        self._facts[command.adapter_id] = replace(command.facts, retired=True)
                    return AdapterProgress()
                case _:
                    return self._drop(command)
        except PagewireError as error:
            return AdapterProgress(error=error.message)
        except RuntimeError as error:  # of the device: its memory is full
            logger.exception("adapter %d cannot be placed", command.adapter_id)
            self._placing = None
            return AdapterProgress(error=f"the adapter does not fit the device: {error}")

    def _load(self, command: AdapterCommand) -> AdapterProgress:
        if command.adapter_id in self._facts:
            return AdapterProgress()
        if not self._is_read(command):
            return AdapterProgress(more=True)
        self._facts[command.adapter_id] = command.facts
        return AdapterProgress()

    def _is_read(self, command: AdapterCommand) -> bool:
        """Whether an adapter is in host memory; has it read otherwise.

        Raises:
            ConfigError: it cannot be read, or does not fit the model.
        """
        adapter_id = command.adapter_id
        if adapter_id in self._kept:
            self._kept.move_to_end(adapter_id)
            return True
        reading = self._reading.get(adapter_id)
        if reading is None:
            self._reading[adapter_id] = _Reading(lambda: self._read(command.facts))
            return False
        if not reading.done.is_set():
            return False
        del self._reading[adapter_id]
        if reading.result is None:
            raise ConfigError(reading.error)
        self._kept[adapter_id] = reading.result
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return True

    def _read(self, facts: AdapterFacts) -> FittedAdapter:
        directory = Path(facts.path)
        adapter = read_adapter(directory, max_rank=self._max_rank)
        if facts.digest and adapter_digest(directory) != facts.digest:
            raise ConfigError(f"{facts.path} has changed since the adapter {facts.name!r} was loaded")
        fitted = self.slots.places.fit(adapter)
        return mapped_tensors(fitted, torch.Tensor.pin_memory) if self._pin else fitted

    def _place(self, command: AdapterCommand) -> AdapterProgress:
        if not 0 <= command.slot < self.slots.num_slots:
            raise ConfigError(f"there is no slot {command.slot}; there are {self.slots.num_slots}")
        if self._slot_of.get(command.adapter_id) == command.slot:
            return AdapterProgress()
        if not self._is_read(command):
            return AdapterProgress(more=True)
        if self._placing is None or self._placing[0] != command:
            self._leave(command.slot)
            self._placing = command, self.slots.place(command.slot, self._kept[command.adapter_id])
        until = time.perf_counter() + PIECE_SECONDS
        for _ in self._placing[1]:
            if time.perf_counter() > until:
                return AdapterProgress(more=True)
        if not self._finish():
            return AdapterProgress(more=True)
        self._placing = None
        self._slot_of[command.adapter_id] = command.slot
        return AdapterProgress()

    def _drop(self, command: AdapterCommand) -> AdapterProgress:
        self._facts.pop(command.adapter_id, None)
        self._kept.pop(command.adapter_id, None)
        slot = self._slot_of.pop(command.adapter_id, None)
        if slot is not None:
            self.slots.clear(slot)
        return AdapterProgress()

    def _leave(self, slot: int) -> None:
        """Forgets which adapter a slot has, as another comes."""
        self._slot_of = {adapter_id: held for adapter_id, held in self._slot_of.items() if held != slot}
        self.slots.clear(slot)

    def reset(self) -> None:
        """Another scheduler begins: it knows of no slot."""
        self._placing = None
        self._slot_of.clear()
