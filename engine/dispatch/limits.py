"""What bounds requests and steps: agreed between a scheduler and its workers, and the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

# The most top entries a token's log probabilities come with.
MAX_TOP_LOGPROBS = 20
# Tokens in all the bad words of a request together.
MAX_BAD_WORD_TOKENS = 4096
# What one step may report, so that results stay small: prompt tokens with log probabilities, and numbers of
# pooled states (at least one state, whatever its size).
MAX_STEP_PROMPT_LOGPROBS = 2048
MAX_STEP_POOLED_NUMBERS = 1 << 20
# A plan holds so many words of new requests, unless it takes more for one request of the longest.
_MAX_PLANNED_WORDS = 1 << 20
# Token ids of other lists than bad words that a request may bring: biases, allowed and masked tokens.
_LISTED_TOKENS = 4 * 1024


_WITH_A_LEAST = ("max_model_len", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_loras")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits of a worker, or of a group of workers that share a model.

    Attributes:
        vocab_size: token ids are smaller.
        hidden_size: numbers of a hidden state.
        num_labels: classes of a classification; 0 for models without a classification head.
        max_model_len: tokens of a request, prompt and completion together; no more than the KV pool holds.
        block_size: tokens per KV block.
        num_blocks: KV blocks in the pool.
        max_num_seqs: request rows, and requests in a step.
        max_num_batched_tokens: tokens computed in a step.
        num_kv_groups: groups of layers, each with a block table of its own in every row.
        max_tokens_per_step: tokens that a request can gain in one step.
        max_loras: adapters that can be in use at once; 0 where there are none.

    Derived from those:
        max_blocks: entries of a row's block table, in each group.
        mask_words: 32-bit words of a mask, one bit for each token of the vocabulary.
        max_new_words: 32-bit words of new requests' data in one plan; enough for any single request.
        max_prompt_logprobs: tokens that the requests with prompt_logprobs may compute in one step, together.
        max_pooled: requests with pooling whose prompts may end in one step.
        pooled_size: numbers that such a request gets.
    """

    vocab_size: int
    hidden_size: int = 1
    num_labels: int = 0
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_groups: int = 1
    max_tokens_per_step: int = 1
    max_loras: int = 0
    max_blocks: int = field(init=False)
    mask_words: int = field(init=False)
    max_new_words: int = field(init=False)
    max_prompt_logprobs: int = field(init=False)
    max_pooled: int = field(init=False)
    pooled_size: int = field(init=False)

    def __post_init__(self) -> None:
        capacity = self.num_blocks * self.block_size
        if self.max_model_len > capacity:
            raise ValueError(f"max_model_len {self.max_model_len} exceeds the KV pool's {capacity} tokens")
        max_blocks = -(-self.max_model_len // self.block_size)
        one_request = (
            self.max_model_len
            + self.num_kv_groups * max_blocks
            + _LISTED_TOKENS
            + 2 * MAX_BAD_WORD_TOKENS
            + 64
        )
        # Many requests with long prompts may begin in one step, as they do when a prefix is cached.
        max_new_words = max(2 * one_request, min(self.max_num_seqs * one_request, _MAX_PLANNED_WORDS))
        max_pooled = min(self.max_num_seqs, MAX_STEP_POOLED_NUMBERS // max(1, self.hidden_size))
        for name, value in (
            ("max_blocks", max_blocks),
            ("mask_words", mask_words(self.vocab_size)),
            ("max_new_words", max_new_words),
            ("max_prompt_logprobs", min(self.max_num_batched_tokens, MAX_STEP_PROMPT_LOGPROBS)),
            ("max_pooled", max(1, max_pooled)),
            ("pooled_size", self.num_labels or self.hidden_size),
        ):
            object.__setattr__(self, name, value)

    def lowered(
        self, *, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None
    ) -> EngineLimits:
        """These, with no more rows and tokens in a step than given."""
        return replace(
            self,
            max_num_seqs=min(self.max_num_seqs, max_num_seqs or self.max_num_seqs),
            max_num_batched_tokens=min(
                self.max_num_batched_tokens, max_num_batched_tokens or self.max_num_batched_tokens
            ),
        )

    @classmethod
    def agree(cls, proposals: Sequence[EngineLimits]) -> EngineLimits:
        """What every one of several workers can keep: the least of each.

        Raises:
            ValueError: they differ in what has no least: the vocabulary, the hidden size, the classes, the
                size of blocks or the number of groups.
        """
        first = proposals[0]
        for name in (
            "vocab_size",
            "hidden_size",
            "num_labels",
            "block_size",
            "num_kv_groups",
            "max_tokens_per_step",
        ):
            values = sorted({getattr(each, name) for each in proposals})
            if len(values) > 1:
                raise ValueError(f"workers of one group differ in {name}: {values}")
        return replace(
            first,
            **{name: min(getattr(each, name) for each in proposals) for name in _WITH_A_LEAST},
        )


def mask_words(vocab_size: int) -> int:
    """32-bit words of a mask, one bit for each token."""
    return -(-vocab_size // 32)
