"""What the worker needs of whatever runs its plans. No torch: an engine without a model needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import u32

# The error of a step over a model that computes NaN or infinity.
NOT_FINITE = "the model's logits are not finite"


class PendingStep(Protocol):
    """A step that was launched and whose result may not be there yet."""

    def done(self) -> bool:
        """Whether `result` would return without waiting."""

    def result(self) -> StepResult:
        """The step's result; waits for the device. An error is a result too."""


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
    """Executes plans in order; owns the requests' rows and the KV pool. One thread uses it."""

    def reset(self) -> None:
        """Forgets every request."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step. Never raises: a failure becomes a result with an error, the last one if the device
        is lost.
        """

    def work_ahead(self) -> bool:
        """Does one piece of work, of some tens of milliseconds, that only makes later steps faster; whether
        there is more of it. To be called between launches.

        Raises:
            DeviceLost: the device failed over it.
        """


class GroupMember(Protocol):
    """A rank's membership in its group, which meets again for every scheduler."""

    def join(self, rendezvous: str) -> None:
        """Meets the other ranks, by a file that is new for each meeting.

        Raises:
            OSError: they did not all come.
        """

    def watch(self, control_fd: int) -> None:
        """From now on, once the descriptor is readable, steps that wait for other ranks fail."""

    def leave(self) -> None:
        """Ends the membership; the other ranks notice."""


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A runner and what a scheduler is told about it.

    Attributes:
        group: where it is one of several ranks.
    """

    runner: Runner
    facts: WorkerFacts
    group: GroupMember | None = None
