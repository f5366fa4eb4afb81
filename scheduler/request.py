"""A request as the scheduler sees it: its tokens, limits and state."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.dispatch.records import NO_TOKENS
from engine.dispatch.sampling import Pooling, SamplingRecord, U32Array
from pagewire.wire.block_hashes import ROOT_HASH, BlockHash, hash_blocks
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.policy.shares import Share

NO_TURN = 1 << 62
"""Values of `Request.turn` from here on, NO_TURN + arrival, mean that the request has not been first in the
queue yet."""


class Status(Enum):
    """The state of a request."""

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
    """State of a request that may be the cause of failed steps; see scheduler/policy/suspects.py.

    Attributes:
        past: number of computed tokens at which the request is cleared.
        num_failures: how often the engine failed while it computed this request alone, since it became a
            suspect.
    """

    past: int = 0
    num_failures: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One request. The scheduler core mutates it; the submitter only reads it.

    Attributes:
        request_id: for logs.
        token_ids: prompt and known output.
        num_prompt_tokens: how many of `token_ids` are prompt.
        sampling: sent to the worker.
        max_total_tokens: the request ends with LENGTH when `token_ids` has this length.
        stop_token_ids: the request ends with STOP after one of these.
        priority: lower goes first; ties by turn.
        client: who sent it; see `Shares.of`.
        owner: the submitter's own data; the core does not read it.
        root_hash: parent hash of its first block; see `pagewire.wire.block_hashes.root_hash`.
        adapter_id: the adapter that its tokens are computed with; 0 is none.
        adapter_slot: the slot of that adapter while the request runs; else -1.
        constraint: the structure that the output must have. Each token is sampled under a mask that the
            submitter provides: see `allow`.
        group: names the client's request that this one is a part of; "" for one that has no other parts.
        part: its number among these parts. The first one, 0, is submitted first.
        trace: sent to the worker; see NewRequest. Empty if the request is not traced.
        prediction: sent to the worker; see NewRequest.
        share: the fairness account of its client's user, while a scheduler has the request.
        num_tokens_at_entry: length of `token_ids` when it was last admitted.
        num_billed_tokens: how many of `token_ids` were charged to `share`, while it runs.
        turn: its place in the order in which requests came to the front of the queue; NO_TURN + arrival
            until it did.
        row: its worker row while it runs (`Rows` then holds its progress), else -1.
        num_pending: while it waits after a preemption, tokens that steps in flight still sample for it.
        block_ids: the KV blocks that it holds: for every `block_size` tokens one of each KV group, in the
            groups' order, or `scheduler.blocks.groups.NO_BLOCK` where the group has given it back.
        block_hashes: the chained hashes of its first full blocks, as far as they were needed.
        num_published_blocks: how many of its first blocks are in the prefix cache, counted in one group.
        num_drafts, num_accepted: draft tokens that were proposed for it, and those that are its output.
        num_cached_tokens: prompt tokens found in the prefix cache at its first admission; -1 before.
        next_prompt_logprobs: index of the first prompt token whose prompt logprobs were not reported yet.
        mask: the tokens allowed at position `mask_at`.
        suspicion: set if the request may be the cause of failed steps; None for nearly all requests. See
            scheduler/policy/suspects.py.
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
    group: str = ""
    part: int = 0
    trace: bytes = b""
    prediction: U32Array = field(default_factory=lambda: NO_TOKENS)

    status: Status = Status.WAITING
    arrival: int = 0
    turn: int = NO_TURN
    share: Share | None = None
    num_tokens_at_entry: int = 0
    num_billed_tokens: int = 0
    row: int = -1
    adapter_slot: int = -1
    num_pending: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
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
        """Marks the request as ended. Its scheduler releases row and blocks and removes it from queues."""
        self.status = Status.ENDED
        self.end_reason = reason
        self.stop_token_id = stop_token_id
        self.error = error

    def allow(self, mask: U32Array) -> None:
        """Sets the mask for the token that follows `token_ids`."""
        self.mask, self.mask_at = mask, len(self.token_ids)

    @property
    def is_blocked(self) -> bool:
        """Whether its next token cannot be sampled yet, for lack of a mask."""
        return self.constraint is not None and self.mask_at != len(self.token_ids)

    @property
    def is_pooling(self) -> bool:
        """Whether the request returns a pooled hidden state instead of tokens."""
        return self.sampling.pooling != Pooling.NONE

    @property
    def num_reusable_tokens(self) -> int:
        """The most leading tokens whose cached KV the request can use. At least the last token is computed,
        for its logits; pooling and prompt logprobs need the hidden states of more tokens.
        """
        if self.sampling.pooling in (Pooling.MEAN, Pooling.CLS):
            return 0
        last = len(self.token_ids) - 1
        if self.sampling.prompt_logprobs >= 0 and self.next_prompt_logprobs < self.num_prompt_tokens:
            return min(last, self.next_prompt_logprobs - 1)
        return last

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Sort key for the order of service: priority, then turn, which falls back to arrival."""
        return (self.priority, self.turn)

    def forget_blocks(self) -> None:
        """Drops its block hashes, because the next scheduler may use another block size."""
        assert not self.block_ids
        self.block_hashes = []

    def hash_up_to(self, count: int, block_size: int) -> None:
        """Extends `block_hashes` to the first `count` blocks, which must be full of known tokens."""
        known = self.block_hashes
        tokens = self.token_ids[len(known) * block_size : count * block_size]
        known += hash_blocks(known[-1] if known else self.root_hash, tokens, block_size)
