"""What the worker needs of whatever runs its plans."""

from __future__ import annotations

from typing import Protocol

from engine.dispatch.records import StepPlan
from engine.pending import PendingStep


class Runner(Protocol):
    """Executes plans in order; owns the requests' rows and the KV pool. One thread uses it."""

    def reset(self) -> None:
        """Forgets every request."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step. Never raises: a failure becomes a result with an error."""

    def work_ahead(self) -> bool:
        """Does one piece of work, of some tens of milliseconds, that only makes later steps faster. To be
        called between launches while it says that there is more.
        """
