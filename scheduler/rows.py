"""The state of the running requests as arrays, indexed by worker row.

In most steps nearly every request decodes one token and nothing else about it changes. With arrays that takes
a handful of numpy operations for all of them; only requests that take a block, fill one or end are handled
one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.request import Request

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Wants:
    """The running requests' demand on the next step. All lists are in order of service.

    Attributes:
        decoding: requests that decode one token and can be planned together.
        decoding_rows: their rows.
        singles: special requests (see `Rows.special`) that have one token to compute and are not blocked.
        chunked: requests that have several tokens to compute: prefill chunks.
        num_steps: how many more steps this demand stays valid for, if each step computes exactly `decoding`.
    """

    decoding: list[Request]
    decoding_rows: IntArray
    singles: list[Request]
    chunked: list[Request]
    num_steps: int

    @property
    def num_singles(self) -> int:
        """Requests that have one token to compute: `decoding` and `singles`."""
        return len(self.decoding_rows) + len(self.singles)

    @classmethod
    def nothing(cls) -> Wants:
        """An empty demand that is valid for no step, so that it is recomputed."""
        return cls([], np.zeros(0, np.int64), [], [], 0)


class Rows:
    """The request in each worker row and its progress. Entries of free rows are undefined.

    Attributes:
        requests: the request in each row; None for a free row.
        num_known: tokens in `Request.token_ids`.
        num_tokens: known tokens plus pending ones, which steps in flight will sample.
        num_computed: tokens whose KV is computed, or will be by the steps in flight.
        num_held: tokens that fit into the request's blocks.
        num_drafts: tokens that steps in flight may sample beyond those counted, if all drafts are accepted.
        drafts_from: number of tokens from which on the request may have drafts.
        max_total: number of tokens at which the request ends.
        special: whether the request must be planned individually even when it decodes: its tokens need masks,
            or it is a pooling request and samples none.
        constrained: whether the request's tokens need masks.
        ready_at: the first step that may decode a row whose last token is still to come: where a model is a
            pipeline, the first stage begins a step when the last one has sampled another.
        blocked: 1 if the next token to sample has no mask yet, else 0.
        num_constrained: number of constrained requests in rows.
    """

    def __init__(self, num_rows: int, block_size: int, num_kv_groups: int = 1) -> None:
        self._block_size = block_size
        self._num_kv_groups = num_kv_groups
        self._free = list(range(num_rows - 1, -1, -1))
        self._freed: list[int] = []
        self._arrivals = np.full(num_rows, -1, np.int64)
        self.requests: list[Request | None] = [None] * num_rows
        self.num_known, self.num_tokens, self.num_computed = np.zeros((3, num_rows), np.int64)
        self.num_held, self.max_total, self.blocked = np.zeros((3, num_rows), np.int64)
        self.num_drafts, self.drafts_from = np.zeros((2, num_rows), np.int64)
        self.ready_at = np.zeros(num_rows, np.int64)
        self.special, self.constrained = np.zeros((2, num_rows), np.bool_)
        self._num_special = self.num_constrained = 0

    @property
    def next_free(self) -> int | None:
        """The row that the next `enter` takes; None if all are taken."""
        return self._free[-1] if self._free else None

    def take_freed(self) -> list[int]:
        """Rows freed since the last call, to be reported to the worker."""
        freed, self._freed = self._freed, []
        return freed

    def enter(self, request: Request, num_computed: int) -> None:
        """Puts a request into row `next_free`. It must hold exactly the blocks of its computed tokens."""
        row = request.row = self._free.pop()
        self.requests[row] = request
        self._arrivals[row] = request.arrival
        self.num_known[row] = self.num_tokens[row] = len(request.token_ids)
        self.num_computed[row] = num_computed
        self.num_drafts[row] = 0
        masks = bool(request.sampling.masked_until_min_tokens)
        self.drafts_from[row] = masks * (request.num_prompt_tokens + request.sampling.min_tokens)
        self.num_held[row] = len(request.block_ids) // self._num_kv_groups * self._block_size
        self.max_total[row] = request.max_total_tokens
        self.blocked[row] = request.is_blocked
        self.constrained[row] = is_constrained = request.constraint is not None
        self.num_constrained += is_constrained
        self.special[row] = is_special = is_constrained or request.is_pooling
        self._num_special += is_special

    def leave(self, request: Request) -> None:
        """Frees a request's row and moves the count of its pending tokens to `Request.num_pending`."""
        row = request.row
        request.num_pending = int(self.num_tokens[row] - self.num_known[row])
        request.row = -1
        self._num_special -= bool(self.special[row])
        self.num_constrained -= bool(self.constrained[row])
        self.constrained[row] = False
        self.requests[row] = None
        self._arrivals[row] = -1
        self._free.append(row)
        self._freed.append(row)

    def gain(self, row: int, count: int) -> None:
        """Counts the tokens that a step sampled for a row; the plan had counted one of them, and none of its
        drafts.

        Raises:
            ValueError: the row's blocks have no room for so many: the worker is broken.
        """
        self.num_known[row] += count
        self.num_tokens[row] += count - 1
        self.num_computed[row] += count - 1
        if self.num_known[row] > self.num_held[row] + 1:
            raise ValueError(f"{count} tokens in a step are more than the blocks of row {row} have room for")

    def holders(self, rows: IntArray) -> list[Request]:
        """The requests in these rows, none of which may be free."""
        requests = self.requests
        return [requests[row] for row in rows.tolist()]

    def arrivals(self, rows: IntArray) -> IntArray:
        """The `Request.arrival` of each row's request; -1 for a free row. Comparing two calls tells whether
        a row still holds the same request.
        """
        return self._arrivals[rows]

    def any_masked_pending(self) -> bool:
        """Whether a step in flight samples a constrained request."""
        if not self.num_constrained:
            return False
        return bool((self.num_tokens > self.num_known)[self.constrained].any())

    def num_left(self, row: int) -> int:
        """Tokens of this row's request that are not computed yet and can be computed now."""
        return self.num_tokens.item(row) - self.num_computed.item(row) - self.blocked.item(row)

    def wants(self, requests: Sequence[Request], step_id: int = 0, num_stages: int = 1) -> Wants:
        """These requests' demand on the next step. A request whose last token is in flight has none.

        Of a pipeline of several stages, the requests that decode are spread over as many steps, so that every
        stage has something to do.
        """
        rows = np.array([request.row for request in requests], np.int64)
        num_to_come = self.max_total[rows] - self.num_tokens[rows]
        left = self.num_tokens[rows] - self.num_computed[rows]
        decodes = (left == 1) & (num_to_come > 0)
        if num_stages > 1:
            share = -(-int(decodes.sum()) // num_stages)
            is_known = self.num_known[rows] == self.num_tokens[rows]
            decodes &= is_known | (self.ready_at[rows] <= step_id)
            decodes[np.flatnonzero(decodes)[share:]] = False
        singles = rows[:0]
        if self._num_special:
            special = self.special[rows]
            singles = rows[decodes & special & (self.blocked[rows] == 0)]
            decodes &= ~special
        decoding, chunked = rows[decodes], rows[left > 1]
        is_steady = num_stages == 1 and len(decoding) and not len(singles) and not len(chunked)
        num_steps = int(num_to_come[decodes].min()) if is_steady else 0
        return Wants(
            self.holders(decoding), decoding, self.holders(singles), self.holders(chunked), num_steps
        )
