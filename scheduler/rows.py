"""The running requests in columns, by worker row.

In most steps nearly every request computes one more token and nothing else about it changes. Kept as arrays,
that is a handful of operations for all of them together; only a request that takes a block, fills one or
ends is touched by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.request import Request

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Rows:
    """Who holds each of the worker's rows, and how far it is. Entries of free rows mean nothing.

    Attributes:
        requests: who holds each row.
        num_known: tokens in `Request.token_ids`.
        num_tokens: those, and pending ones: tokens that steps in flight will have sampled.
        num_computed: tokens whose KV is computed, or will be by the steps in flight.
        num_held: tokens that fit into the blocks it holds.
        max_total: tokens at which it ends.
        planned_step: the last step that computes tokens of it.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_rows - 1, -1, -1))
        self._freed: list[int] = []
        self._arrivals = np.full(num_rows, -1, np.int64)
        self.requests: list[Request | None] = [None] * num_rows
        (
            self.num_known,
            self.num_tokens,
            self.num_computed,
            self.num_held,
            self.max_total,
            self.planned_step,
        ) = np.zeros((6, num_rows), np.int64)

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
        self.planned_step[row] = -1

    def leave(self, request: Request) -> None:
        """Takes its row from a request, which from now on counts its pending tokens itself."""
        row = request.row
        request.num_pending = int(self.num_tokens[row] - self.num_known[row])
        request.row = -1
        self.requests[row] = None
        self._arrivals[row] = -1
        self._free.append(row)
        self._freed.append(row)

    def holders(self, rows: IntArray) -> list[Request]:
        """The requests in these rows, which are all taken."""
        requests = self.requests
        return [requests[row] for row in rows.tolist()]

    def arrivals(self, rows: IntArray) -> IntArray:
        """What `Request.arrival` each of these rows' holder has, to ask later whether it is still there."""
        return self._arrivals[rows]

    def in_order(self, requests: Sequence[Request]) -> IntArray:
        """The rows of these requests."""
        return np.array([request.row for request in requests], np.int64)
