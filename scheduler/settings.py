"""Settings of the scheduler core, in addition to the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.base.settings import require

INFLIGHT = "inflight"
BATCHING_STRATEGIES = ("none", "static", "dynamic", INFLIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Settings of the scheduler core.

    Attributes:
        max_num_waiting: the most requests that may wait.
        enable_prefix_caching: whether blocks are shared by content.
        target_itl: seconds that a step with decodes may take; None sets no limit.
        batching_strategy: one of BATCHING_STRATEGIES; see scheduler/policy/batching.py.
    """

    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    target_itl: float | None = None
    batching_strategy: str = INFLIGHT

    def __post_init__(self) -> None:
        """Raises ConfigError for a strategy that does not exist."""
        require(
            self.batching_strategy in BATCHING_STRATEGIES,
            "batching_strategy",
            self.batching_strategy,
            f"one of {', '.join(BATCHING_STRATEGIES)}",
        )
