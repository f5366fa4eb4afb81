"""The running requests in columns, by worker row.

In most steps nearly every request computes one more token and nothing else about it changes. Kept as arrays,
that is a handful of operations for all of them together; only a request that takes a block, fills one or
ends is touched by itself.
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
    """What running requests want of a step, in order of service.

    Attributes:
        decoding: requests of which one token is left to compute.
        decoding_rows: their rows.
        singles: special requests of which one token is left to compute, and may be computed.
        chunked: requests of which more than one is left.
        num_steps: for how many more steps this holds, if each computes `decoding` and nothing else happens.
    """

    decoding: list[Request]
    decoding_rows: IntArray
    singles: list[Request]
    chunked: list[Request]
    num_steps: int

    @property
    def num_singles(self) -> int:
        """Requests of either kind that lack one token."""
        return len(self.decoding_rows) + len(self.singles)

    @classmethod
    def nothing(cls) -> Wants:
        """Of no requests; it holds for no step."""
        return cls([], np.zeros(0, np.int64), [], [], 0)


class Rows:
    """Who holds each of the worker's rows, and how far it is. Entries of free rows mean nothing.

    Attributes:
        requests: who holds each row.
        num_known: tokens in `Request.token_ids`.
        num_tokens: those, and pending ones: tokens that steps in flight will have sampled.
        num_computed: tokens whose KV is computed, or will be by the steps in flight.
        num_held: tokens that fit into the blocks it holds.
        max_total: tokens at which it ends.
        special: whether it cannot be planned together with all others that lack one token: its tokens need
            masks, or it samples none.
        constrained: whether its tokens need masks.
        blocked: 1 where the next token to sample has no mask yet, else 0.
        num_constrained: how many of the requests are constrained.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_rows - 1, -1, -1))
        self._freed: list[int] = []
        self._arrivals = np.full(num_rows, -1, np.int64)
        self.requests: list[Request | None] = [None] * num_rows
        self.num_known, self.num_tokens, self.num_computed = np.zeros((3, num_rows), np.int64)
        self.num_held, self.max_total, self.blocked = np.zeros((3, num_rows), np.int64)
        self.special, self.constrained = np.zeros((2, num_rows), np.bool_)
        self._num_special = self.num_constrained = 0

    @property
    def next_free(self) -> int | None:
        """The row that the next `enter` takes."""
        return self._free[-1] if self._free else None

    def take_freed(self) -> list[int]:
        """Rows left since the last call, for the worker to hear of."""
        freed, self._freed = self._freed, []
        return freed

    def enter(self, request: Request, num_computed: int) -> None:
        """Gives a request `next_free`. It holds the blocks of its computed tokens and no others."""
        row = request.row = self._free.pop()
        self.requests[row] = request
        self._arrivals[row] = request.arrival
        self.num_known[row] = self.num_tokens[row] = len(request.token_ids)
        self.num_computed[row] = num_computed
        self.num_held[row] = len(request.block_ids) * self._block_size
        self.max_total[row] = request.max_total_tokens
        self.blocked[row] = request.is_blocked
        self.constrained[row] = is_constrained = request.constraint is not None
        self.num_constrained += is_constrained
        self.special[row] = is_special = is_constrained or request.is_pooling
        self._num_special += is_special

    def leave(self, request: Request) -> None:
        """Takes its row from a request, which from now on counts its pending tokens itself."""
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
        """Counts the tokens that a step has gained a request, of which one was expected.

        Raises:
            ValueError: there is no room for so many in its blocks: a broken worker.
        """
        self.num_known[row] += count
        self.num_tokens[row] += count - 1
        self.num_computed[row] += count - 1
        if self.num_computed[row] > self.num_held[row]:
            raise ValueError(f"{count} tokens in a step are more than the blocks of row {row} have room for")

    def holders(self, rows: IntArray) -> list[Request]:
        """The requests in these rows, which are all taken."""
        requests = self.requests
        return [requests[row] for row in rows.tolist()]

    def arrivals(self, rows: IntArray) -> IntArray:
        """What `Request.arrival` each of these rows' holder has, to ask later whether it is still there."""
        return self._arrivals[rows]

    def any_masked_pending(self) -> bool:
        """Whether a step in flight samples a constrained request."""
        if not self.num_constrained:
            return False
        return bool((self.num_tokens > self.num_known)[self.constrained].any())

    def num_left(self, row: int) -> int:
        """How many of its tokens can be computed now that are not computed yet."""
        return self.num_tokens.item(row) - self.num_computed.item(row) - self.blocked.item(row)

    def wants(self, requests: Sequence[Request]) -> Wants:
        """What these requests want. One whose last token is in flight wants nothing."""
        rows = np.array([request.row for request in requests], np.int64)
        num_to_come = self.max_total[rows] - self.num_tokens[rows]
        left = self.num_tokens[rows] - self.num_computed[rows]
        decodes = (left == 1) & (num_to_come > 0)
        singles = rows[:0]
        if self._num_special:
            special = self.special[rows]
            singles = rows[decodes & special & (self.blocked[rows] == 0)]
            decodes &= ~special
        decoding, chunked = rows[decodes], rows[left > 1]
        is_steady = len(decoding) and not len(singles) and not len(chunked)
        num_steps = int(num_to_come[decodes].min()) if is_steady else 0
        return Wants(
            self.holders(decoding), decoding, self.holders(singles), self.holders(chunked), num_steps
        )
