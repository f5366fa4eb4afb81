"""What the decision core is told to do, beside the limits of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """How the core decides; EngineLimits say within which bounds.

    Attributes:
        max_num_waiting: requests that may wait.
        enable_prefix_caching: whether blocks are shared by content.
        target_itl: seconds that a step may take in which running requests gain tokens; None bounds none.
    """

    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    target_itl: float | None = None
