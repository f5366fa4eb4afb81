"""A request as the scheduler sees it: tokens in, tokens out, and where it stands."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.dispatch.sampling import Pooling, SamplingRecord, U32Array
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.blocks.hashes import ROOT_HASH, BlockHash, hash_blocks
from scheduler.policy.shares import Share

NO_TURN = 1 << 62
"""Before this are turns of requests that had theirs; behind it, by arrival, those that have not."""


class Status(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class EndReason(Enum):
    """Why a request ended."""

    STOP = auto()
    LENGTH = auto()
    ABORT = auto()
    ERROR = auto()


@dataclass(slots=True)
class Suspicion:
    """That a request makes steps fail; see scheduler/policy/suspects.py.

    Attributes:
        past: it is cleared once so many of its tokens are computed.
        num_failures: how often the engine failed while it computed this request alone, since it became a
            suspect.
    """

    past: int = 0
    num_failures: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One request. The scheduler core mutates it; whoever submitted it reads it.

    Attributes:
        request_id: for logs.
        token_ids: prompt and known output.
        num_prompt_tokens: how many of `token_ids` are prompt.
        sampling: sent to the worker.
        max_total_tokens: it ends with LENGTH when `token_ids` has grown to this.
        stop_token_ids: it ends with STOP after one of these.
        priority: lower goes first; ties by turn.
        client: whose it is; see `Shares.of`.
        owner: whatever the submitter wants to find again; the core does not look at it.
        root_hash: parent of its first block; see `scheduler.blocks.hashes.root_hash`.
        adapter_id: of the adapter that its tokens are computed with; 0 is none.
        constraint: what its output must look like. It is sampled only under a mask, which its submitter gives
            for one token at a time: see `allow`.
        share: what its client's user was served, while a scheduler has the request.
        num_tokens_at_entry: how many `token_ids` it had when it took its row.
        num_billed_tokens: how many of `token_ids` were charged to that, while it runs.
        turn: which request of its scheduler it was to be the first to be served; NO_TURN and more, by
            arrival, as long as it was not.
        row: the worker row it holds while it runs, where `Rows` knows how far it is; else -1.
        num_pending: while it waits, tokens that steps in flight will have sampled nevertheless.
        num_cached_tokens: prompt tokens found in the prefix cache when it was first admitted.
        next_prompt_logprobs: index of the first prompt token whose log probabilities were not reported yet.
        mask: the tokens that may come after `mask_at` tokens.
        suspicion: that it makes steps fail; None for nearly all requests. See scheduler/policy/suspects.py.
    """

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    sampling: SamplingRecord
    max_total_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    client: str = ""
    owner: object = None
    root_hash: BlockHash = ROOT_HASH
    adapter_id: int = 0
    constraint: StructuredOutput | None = None

    status: Status = Status.WAITING
    arrival: int = 0
    turn: int = NO_TURN
    share: Share | None = None
    num_tokens_at_entry: int = 0
    num_billed_tokens: int = 0
    row: int = -1
    num_pending: int = 0
    num_cached_tokens: int = -1
    num_preemptions: int = 0
    suspicion: Suspicion | None = None
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_published_blocks: int = 0
    next_prompt_logprobs: int = 1
    mask: U32Array | None = None
    mask_at: int = -1
    end_reason: EndReason | None = None
    stop_token_id: int | None = None
    error: str = ""

    def end(self, reason: EndReason, *, stop_token_id: int | None = None, error: str = "") -> None:
        """Marks it ended. Row, blocks and queues are its scheduler's to take it from."""
        self.status = Status.ENDED
        self.end_reason = reason
        self.stop_token_id = stop_token_id
        self.error = error

    def allow(self, mask: U32Array) -> None:
        """Takes the mask for the token after those it has."""
        self.mask, self.mask_at = mask, len(self.token_ids)

    @property
    def is_blocked(self) -> bool:
        """Whether its next token has to wait for a mask."""
        return self.constraint is not None and self.mask_at != len(self.token_ids)

    @property
    def is_pooling(self) -> bool:
        """Whether it ends with a pooled state instead of tokens."""
        return self.sampling.pooling != Pooling.NONE

    @property
    def num_reusable_tokens(self) -> int:
        """How many of its first tokens need not be computed if their KV is there already. The last one's
        logits are needed, and pooling and log probabilities of the prompt need more.
        """
        if self.sampling.pooling in (Pooling.MEAN, Pooling.CLS):
            return 0
        last = len(self.token_ids) - 1
        if self.sampling.prompt_logprobs >= 0 and self.next_prompt_logprobs < self.num_prompt_tokens:
            return min(last, self.next_prompt_logprobs - 1)
        return last

    @property
    def num_output_tokens(self) -> int:
        """Known generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of service: priority, then who was first in the queue, then arrival."""
        return (self.priority, self.turn)

    def forget_blocks(self) -> None:
        """Forgets the hashes of its blocks, because the next scheduler's blocks may have another size."""
        assert not self.block_ids
        self.block_hashes = []

    def hash_up_to(self, count: int, block_size: int) -> None:
        """Extends `block_hashes` to its first `count` blocks, which must be full of known tokens."""
        known = self.block_hashes
        tokens = self.token_ids[len(known) * block_size : count * block_size]
        known += hash_blocks(known[-1] if known else self.root_hash, tokens, block_size)
