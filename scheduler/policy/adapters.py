"""Which adapters have slots on the device.

An adapter that requests run with has a slot. An adapter that a waiting request needs, and that has none,
gets a free one, or the one of the adapter that nobody runs with and that was used the longest ago. If all
are in use,
one of them is drained: requests that wait for its adapter are left waiting until it is empty, so that nobody
waits for ever behind a stream of others.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduler.request import Request


class AdapterSlots:
    """The slots of one attachment's workers.

    `admits` decides; whoever drives the core asks `next_placement` what is to be copied where, and tells
    `placed` when it is. No request runs with an adapter before that.

    Args:
        num_slots: how many there are.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._loaded: set[int] = set()
        self._slot_of: dict[int, int] = {}
        # Slot -> requests that run with its adapter.
        self._num_running = [0] * num_slots
        self._last_used = [0] * num_slots
        self._num_uses = 0
        self._wanted: dict[int, None] = {}
        self._placing: tuple[int, int] | None = None
        self._draining: int | None = None

    def loaded(self, adapter_id: int) -> None:
        """The workers have read an adapter: it can be placed."""
        self._loaded.add(adapter_id)

    def dropped(self, adapter_id: int) -> None:
        """An adapter is no more; nobody runs with it or waits for it."""
        self._loaded.discard(adapter_id)
        self._wanted.pop(adapter_id, None)
        slot = self._slot_of.pop(adapter_id, None)
        if slot is not None:
            self._last_used[slot] = 0

    def admits(self, request: Request) -> bool:
        """Whether a request's adapter has a slot. If not, it is noted that one is wanted."""
        adapter_id = request.adapter_id
        if not adapter_id:
            return True
        slot = self._slot_of.get(adapter_id)
        if slot is None or (slot == self._draining and self._wanted):
            if slot is None:
                self._wanted.setdefault(adapter_id)
            return False
        return True

    def slot_of(self, request: Request) -> int:
        """The slot of a request's adapter, which has one; -1 for the base model."""
        return self._slot_of[request.adapter_id] if request.adapter_id else -1

    def enter(self, request: Request) -> None:
        """A request begins to run; `admits` said that it may."""
        if request.adapter_id:
            slot = request.adapter_slot = self._slot_of[request.adapter_id]
            self._num_running[slot] += 1
            self._num_uses += 1
            self._last_used[slot] = self._num_uses

    def leave(self, request: Request) -> None:
        """A request runs no more."""
        if request.adapter_id:
            self._num_running[request.adapter_slot] -= 1
            request.adapter_slot = -1

    def next_placement(self) -> tuple[int, int] | None:
        """(adapter, slot) of what is to be placed next; None for nothing, or while one is being placed."""
        if self._placing is not None:
            return None
        wanted = next((each for each in self._wanted if each in self._loaded), None)
        if wanted is None:
            return None
        slot = self._free_slot()
        if slot is None:
            if self._draining is None:
                # The one with the fewest requests is empty soonest.
                self._draining = min(range(self.num_slots), key=lambda each: self._num_running[each])
            return None
        del self._wanted[wanted]
        self._draining = None
        self._slot_of = {each: held for each, held in self._slot_of.items() if held != slot}
        self._placing = wanted, slot
        return self._placing

    def _free_slot(self) -> int | None:
        taken = set(self._slot_of.values())
        free = [slot for slot in range(self.num_slots) if not self._num_running[slot]]
        return min(free, key=lambda slot: (slot in taken, self._last_used[slot]), default=None)

    def placed(self, adapter_id: int, slot: int) -> None:
        """A placement is done."""
        self._placing = None
        self._slot_of[adapter_id] = slot
        self._num_uses += 1
        self._last_used[slot] = self._num_uses

    def not_placed(self, adapter_id: int) -> None:
        """A placement failed; requests that want the adapter must be ended."""
        self._placing = None
        self._wanted.pop(adapter_id, None)

    @property
    def has_wishes(self) -> bool:
        """Whether an adapter that is loaded waits for a slot."""
        return any(each in self._loaded for each in self._wanted)

    @property
    def in_use(self) -> Collection[int]:
        """The adapters that requests run with."""
        return [each for each, slot in self._slot_of.items() if self._num_running[slot]]

    @property
    def resident(self) -> Collection[int]:
        """The adapters that have a slot."""
        return self._slot_of.keys()
