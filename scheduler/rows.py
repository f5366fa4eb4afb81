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
        chunked: requests of which more than one is left.
        num_steps: for how many more steps this holds, if each computes `decoding` and nothing else happens.
    """

    decoding: list[Request]
    decoding_rows: IntArray
    chunked: list[Request]
    num_steps: int

    @classmethod
    def nothing(cls) -> Wants:
        """Of no requests; it holds for no step."""
        return cls([], np.zeros(0, np.int64), [], 0)


class Rows:
    """Who holds each of the worker's rows, and how far it is. Entries of free rows mean nothing.

    Attributes:
        requests: who holds each row.
        num_known: tokens in `Request.token_ids`.
        num_tokens: those, and pending ones: tokens that steps in flight will have sampled.
        num_computed: tokens whose KV is computed, or will be by the steps in flight.
        num_held: tokens that fit into the blocks it holds.
        max_total: tokens at which it ends.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_rows - 1, -1, -1))
        self._freed: list[int] = []
        self._arrivals = np.full(num_rows, -1, np.int64)
        self.requests: list[Request | None] = [None] * num_rows
        self.num_known, self.num_tokens, self.num_computed = np.zeros((3, num_rows), np.int64)
        self.num_held, self.max_total = np.zeros((2, num_rows), np.int64)

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

    def num_left(self, row: int) -> int:
        """How many of its tokens are not computed yet."""
        return self.num_tokens.item(row) - self.num_computed.item(row)

    def wants(self, requests: Sequence[Request]) -> Wants:
        """What these requests want. One whose last token is in flight wants nothing."""
        rows = np.array([request.row for request in requests], np.int64)
        num_to_come = self.max_total[rows] - self.num_tokens[rows]
        left = self.num_tokens[rows] - self.num_computed[rows]
        decodes = (left == 1) & (num_to_come > 0)
        decoding, chunked = rows[decodes], rows[left > 1]
        num_steps = 0 if len(chunked) or not len(decoding) else int(num_to_come[decodes].min())
        return Wants(self.holders(decoding), decoding, self.holders(chunked), num_steps)
