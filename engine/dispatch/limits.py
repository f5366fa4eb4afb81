"""What bounds requests and steps: agreed between a scheduler and its workers, and the same for both."""

from __future__ import annotations

from bisect import bisect_right
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
# Draft tokens that all requests of a step may have together: with more a step takes longer than they save.
MAX_STEP_DRAFT_TOKENS = 512
# Tokens of a request's prediction that are kept for proposers.
MAX_PREDICTION_TOKENS = 8192
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
        max_model_len: tokens of a request, prompt and completion together; no more than the KV pool holds
            (see `fewest_blocks`).
        block_size: tokens per KV block.
        num_blocks: KV blocks in the pool. A block holds the keys and values of one KV group's layers.
        max_num_seqs: request rows, and requests in a step.
        max_num_batched_tokens: tokens computed in a step.
        kv_windows: the window of each KV group, groups of layers that have block tables of their own in every
            row. No layer of a group sees more tokens than its window, a token's own included; 0 is no limit.
        max_tokens_per_step: tokens that a request can gain in one step: more than 1 with speculation.
        max_loras: adapters that can be in use at once; 0 where there are none.

    Derived from those:
        num_kv_groups: how many KV groups there are.
        max_blocks: entries of a row's block table, in each group.
        mask_words: 32-bit words of a mask, one bit for each token of the vocabulary.
        max_new_words: 32-bit words of new requests' data in one plan; enough for any single request.
        max_prompt_logprobs: tokens that the requests with prompt_logprobs may compute in one step, together.
        max_pooled: requests with pooling whose prompts may end in one step.
        pooled_size: numbers that such a request gets.
        max_drafts: draft tokens of a request in one step; 0 without speculation.
        max_draft_tokens: draft tokens of all requests in one step.
        max_prediction: tokens of a request's prediction; 0 without speculation.
    """

    vocab_size: int
    hidden_size: int = 1
    num_labels: int = 0
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_windows: tuple[int, ...] = (0,)
    max_tokens_per_step: int = 1
    max_loras: int = 0
    num_kv_groups: int = field(init=False)
    max_blocks: int = field(init=False)
    mask_words: int = field(init=False)
    max_new_words: int = field(init=False)
    max_prompt_logprobs: int = field(init=False)
    max_pooled: int = field(init=False)
    pooled_size: int = field(init=False)
    max_drafts: int = field(init=False)
    max_draft_tokens: int = field(init=False)
    max_prediction: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.kv_windows:
            raise ValueError("kv_windows is empty; there must be at least one KV group")
        needed = fewest_blocks(self.max_model_len, self.block_size, self.kv_windows)
        if needed > self.num_blocks:
            raise ValueError(
                f"max_model_len {self.max_model_len} needs {needed} KV blocks, the pool has {self.num_blocks}"
            )
        max_blocks = -(-self.max_model_len // self.block_size)
        one_request = (
            self.max_model_len
            + len(self.kv_windows) * max_blocks
            + _LISTED_TOKENS
            + 2 * MAX_BAD_WORD_TOKENS
            + 64
        )
        max_drafts = self.max_tokens_per_step - 1
        max_prediction = min(self.max_model_len, MAX_PREDICTION_TOKENS) if max_drafts else 0
        one_request += max_prediction
        # Many requests with long prompts may begin in one step, as they do when a prefix is cached.
        max_new_words = max(2 * one_request, min(self.max_num_seqs * one_request, _MAX_PLANNED_WORDS))
        max_pooled = min(self.max_num_seqs, MAX_STEP_POOLED_NUMBERS // max(1, self.hidden_size))
        for name, value in (
            ("num_kv_groups", len(self.kv_windows)),
            ("max_blocks", max_blocks),
            ("mask_words", mask_words(self.vocab_size)),
            ("max_new_words", max_new_words),
            ("max_prompt_logprobs", min(self.max_num_batched_tokens, MAX_STEP_PROMPT_LOGPROBS)),
            ("max_pooled", max(1, max_pooled)),
            ("pooled_size", self.num_labels or self.hidden_size),
            ("max_drafts", max_drafts),
            ("max_draft_tokens", min(self.max_num_seqs * max_drafts, MAX_STEP_DRAFT_TOKENS)),
            ("max_prediction", max_prediction),
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
                size of blocks or the KV groups.
        """
        first = proposals[0]
        for name in (
            "vocab_size",
            "hidden_size",
            "num_labels",
            "block_size",
            "kv_windows",
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


def fewest_blocks(num_tokens: int, block_size: int, kv_windows: Sequence[int]) -> int:
    """KV blocks with which a request of so many tokens can be computed while no other request runs.

    In a group with a window it needs those of the tokens that the next one sees, and one more to compute in:
    what lies behind the window is given back after every step, and a step may compute as little as a block.
    """
    num_blocks = -(-num_tokens // block_size)
    return sum(
        min(num_blocks, -(-(window - 1) // block_size) + 1) if window else num_blocks for window in kv_windows
    )


def longest_request(most: int, num_blocks: int, block_size: int, kv_windows: Sequence[int]) -> int:
    """Tokens of the longest request that a pool of `num_blocks` can hold, but no more than `most`."""
    lengths = range(block_size, most + block_size, block_size)
    count = bisect_right(lengths, num_blocks, key=lambda each: fewest_blocks(each, block_size, kv_windows))
    return min(most, count * block_size)
