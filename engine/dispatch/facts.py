"""What a worker tells a scheduler about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker's model and limits, as sent in the Welcome message of the handshake.

    Attributes:
        model: name or path of the model it loaded.
        vocab_size: token ids are smaller than this.
        max_model_len: the longest request, prompt and completion together, in tokens; never more than the
            KV pool holds.
        eos_token_ids: tokens that end a completion.
        block_size: tokens per KV block.
        num_blocks: KV blocks in the pool.
        max_num_seqs: request rows.
        max_num_batched_tokens: the most tokens computed in a step.
        dtype: number format of weights and KV, such as "float32".
        device: where it runs, such as "cpu" or "cuda:0 NVIDIA H200".
        hidden_size: numbers in a hidden state.
        rank, world_size: its place among the workers that share the model.
    """

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    device: str
    hidden_size: int
    rank: int = 0
    world_size: int = 1
