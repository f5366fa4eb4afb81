"""Settings of the scheduler core, in addition to the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Settings of the scheduler core.

    Attributes:
        max_num_waiting: the most requests that may wait.
        enable_prefix_caching: whether blocks are shared by content.
        target_itl: seconds that a step with decodes may take; None sets no limit.
    """

    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    target_itl: float | None = None
