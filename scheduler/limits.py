"""What bounds the scheduler's decisions."""

from __future__ import annotations

from dataclasses import dataclass

from engine.dispatch.records import RecordLimits


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What bounds the scheduler's decisions.

    Attributes:
        num_blocks: KV blocks in the pool.
        block_size: tokens per block.
        max_num_seqs: requests in a step.
        max_num_batched_tokens: tokens in a step.
        max_model_len: tokens in a request.
        vocab_size: token ids are smaller.
        hidden_size: numbers of a pooled state.
        max_num_waiting: requests that may wait.
        enable_prefix_caching: whether blocks are shared by content.
        target_itl: seconds that a step may take in which running requests gain tokens; None bounds none.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    hidden_size: int = 1
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    target_itl: float | None = None

    def __post_init__(self) -> None:
        capacity = self.num_blocks * self.block_size
        if self.max_model_len > capacity:
            raise ValueError(f"max_model_len {self.max_model_len} exceeds the KV pool's {capacity} tokens")

    @property
    def records(self) -> RecordLimits:
        """What fits one plan and one result."""
        return RecordLimits.derive(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
        )
