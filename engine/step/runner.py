"""The interface between the worker and its runner. It imports no torch, for engines without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import u32

# The error of a step whose logits contain NaN or infinity.
NOT_FINITE = "the model's logits are not finite"


class PendingStep(Protocol):
    """A launched step, whose result may not be available yet."""

    def done(self) -> bool:
        """Whether `result` would return without waiting."""

    def result(self) -> StepResult:
        """Waits for the device and returns the step's result, which carries an error if the step failed."""


class DeviceLost(Exception):
    """The device failed in a way from which this process cannot recover."""


class FinishedStep:
    """A step whose result is known."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    @classmethod
    def failed(cls, step_id: int, error: str, *, is_last: bool = False) -> FinishedStep:
        """A step that ended with an error; see StepResult."""
        return cls(StepResult(step_id, u32([]), error=error, is_last=is_last))

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


class Runner(Protocol):
    """Executes plans in order; owns the requests' rows and the KV pool. Used by one thread only."""

    def reset(self) -> None:
        """Forgets every request."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step. Never raises: on a failure the result carries an error, and is marked as the last
        one if the device is lost.
        """

    def work_ahead(self) -> bool:
        """Does one piece of optional work that makes later steps faster and takes some tens of milliseconds.
        Returns whether there is more. Call it between launches.

        Raises:
            DeviceLost: the device failed during the work.
        """


@dataclass(frozen=True, slots=True)
class AdapterProgress:
    """How far a worker is with an adapter command.

    Attributes:
        more: whether the command must be sent again.
        error: why it cannot be done; "" if nothing is wrong.
    """

    more: bool = False
    error: str = ""


class Adapters(Protocol):
    """Executes adapter commands. The thread that launches steps calls it, between two of them."""

    @property
    def loaded(self) -> tuple[AdapterFacts, ...]:
        """The adapters that were loaded and not dropped, in this order."""
        ...

    def execute(self, command: AdapterCommand) -> AdapterProgress:
        """Does a piece of a command's work. Never raises."""
        ...

    def reset(self) -> None:
        """Forgets which adapter is in which slot, and keeps the adapters."""


class GroupMember(Protocol):
    """A rank's membership in its group, which is formed anew for every scheduler."""

    def join(self, rendezvous: str) -> None:
        """Joins the other ranks through a rendezvous file, which is new each time.

        Raises:
            OSError: not all ranks joined.
        """

    def watch(self, control_fd: int) -> None:
        """Makes steps that wait for other ranks fail once the descriptor is readable."""

    def leave(self) -> None:
        """Leaves the group; the other ranks are notified."""

    @property
    def has_given_up(self) -> bool:
        """Whether the device ended a wait for another rank by itself, so that results mean nothing."""


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A runner and the facts about it for the scheduler.

    Attributes:
        runner: executes the plans.
        facts: sent to the scheduler.
        group: the rank's group; None if there is only one rank.
        adapters: executes adapter commands; None where no adapters are served.
        met: called whenever the group has met, before the first plan; raises OSError if the rank must not go
            on with it.
    """

    runner: Runner
    facts: WorkerFacts
    group: GroupMember | None = None
    adapters: Adapters | None = None
    met: Callable[[], None] | None = None
