"""Computes prompt logprobs and pooled states after a step's model, without waiting for the device; see
prompt_work.py.

A step without such requests launches none of these kernels. A step with them does not use a CUDA graph, and
keeps its hidden states until these kernels have read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.logprobs import LogprobsBuffers, LogprobsRequest
from engine.cuda.rows import DeviceRows
from engine.cuda.staging import NUM_TURNS, Staging
from engine.cuda.step_layout import StepLayout
from engine.dispatch.records import PromptLogprobs
from engine.dispatch.sampling import F32Array
from engine.kernels.pooling.kernel import PooledColumns, pool_hidden
from engine.kernels.sampling.logprobs import Logprobs, LogprobsWorkspace, gather_logprobs
from engine.step.prompt_work import PooledChunk, PromptWork, logprobs_places, split_logprobs

# Positions whose logits are computed at once. The number is fixed, so that one matrix product and one kernel
# serve all prompts.
POSITIONS_AT_ONCE = 256

# From some hidden states to others of as many rows.
Compute = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PromptTransfer:
    """One step's prompt logprobs and pooled states, on their way to the host.

    Attributes:
        work: the requested work.
        logprobs: the prompt logprobs of all its tokens; None if none were requested.
        pooled, pooled_host: what becomes of complete pooled states, on the device and the host, [n, size]
            fp32.
    """

    work: PromptWork
    logprobs: LogprobsRequest | None
    pooled: torch.Tensor
    pooled_host: torch.Tensor

    def to_host(self) -> None:
        """Starts the copies to the host, on the current stream."""
        if self.logprobs is not None:
            self.logprobs.to_host()
        if len(self.pooled):
            self.pooled_host.copy_(self.pooled, non_blocking=True)

    def results(self) -> tuple[list[PromptLogprobs], dict[int, F32Array]]:
        """(prompt logprobs, pooled states by column) for the step's result. Call it after the copies to the
        host are over.

        If prompt logprobs are not finite, the model's logits were not.
        """
        told: list[PromptLogprobs] = []
        if self.logprobs is not None:
            told = split_logprobs(self.work.logprobs, *self.logprobs.arrays())
        complete = [chunk.index for chunk in self.work.pooled if chunk.divisor]
        return told, dict(zip(complete, self.pooled_host.numpy().copy(), strict=True))


class PromptStates:
    """Owns the memory for prompt logprobs and pooled states; one per runner.

    Args:
        rows: the runner's rows.
        compute_logits: computes the logits of at most POSITIONS_AT_ONCE hidden states.
        finish_pooled: makes what requests get of complete pooled states; see CausalLM.
        device: the runner's device.
    """

    def __init__(
        self, rows: DeviceRows, compute_logits: Compute, finish_pooled: Compute, device: torch.device
    ) -> None:
        limits = rows.limits
        self._rows = rows
        self._compute_logits = compute_logits
        self._finish_pooled = finish_pooled
        self._at_once = POSITIONS_AT_ONCE
        self._staging = Staging(NUM_TURNS, device)
        self._workspace = LogprobsWorkspace.allocate(self._at_once, rows.limits.vocab_size, device)
        self._results = LogprobsBuffers(NUM_TURNS, limits.max_prompt_logprobs, device)
        self._slot = torch.zeros(1, dtype=torch.int32, device=device)
        size = limits.hidden_size
        self._sums = torch.zeros((rows.limits.max_num_seqs, size), device=device)
        self._pooled = torch.zeros((NUM_TURNS, limits.max_pooled, size), device=device)
        self._pooled_host = torch.zeros(
            (NUM_TURNS, limits.max_pooled, limits.pooled_size), pin_memory=device.type == "cuda"
        )
        self._turn = 0

    def after_model(
        self,
        work: PromptWork,
        layout: StepLayout,
        hidden: torch.Tensor,
        compute_logits: Callable[[torch.Tensor, IntArray], torch.Tensor] | None = None,
    ) -> PromptTransfer:
        """Computes a step's prompt logprobs and pooled states.

        Args:
            work: the requested work.
            layout: the step's layout; the step has no padding.
            hidden: final hidden states of the step's tokens, [T, hidden].
            compute_logits: from hidden states, and which of the step's tokens they are of, where the logits
                depend on the token; by default what the model computes for any.
        """
        begins = np.empty_like(layout.counts)
        begins[layout.plan_index] = np.cumsum(layout.counts) - layout.counts
        arrays, num_top = [], 0
        if work.logprobs:
            places = logprobs_places(work.logprobs, begins, self._rows.limits.max_model_len)
            arrays, num_top = self._logprobs_arrays(places.hidden, places.targets), places.num_top
        if work.pooled:
            arrays += _pooled_arrays(work.pooled, begins)
        staged = self._staging.send(arrays)
        request = None
        if work.logprobs:
            positions, targets, entries, *staged = staged
            num_tokens = sum(chunk.count for chunk in work.logprobs)
            request = self._results.take(np.arange(num_tokens), np.array([num_top]))
            compute = None if compute_logits is None else partial(_of_part, compute_logits, arrays[0])
            self._gather(hidden, positions, targets, entries, request, compute)
        return self._pool(hidden, work, staged, request)

    def rehearse(self, hidden: torch.Tensor) -> None:
        """Launches all kernels of this module without a request, so that they are compiled."""
        nobody = np.zeros(1, dtype=np.int64)
        arrays = self._logprobs_arrays(nobody, nobody)
        arrays[2][:] = -1
        pooled = [PooledChunk(index=0, row=-1, begin=0, end=0, continues=False, divisor=0)]
        staged = self._staging.send(arrays + _pooled_arrays(pooled, nobody))
        positions, targets, entries, *pooling = staged
        request = self._results.take(nobody, np.ones(1, dtype=np.int64))
        self._gather(hidden, positions, targets, entries, request)
        self._pool(hidden, PromptWork((), pooled), pooling, None)
        self._finish_pooled(self._pooled[0, :1])

    def _logprobs_arrays(self, hidden: IntArray, targets: IntArray) -> list[np.ndarray]:
        """(positions, targets, entries), padded to a multiple of POSITIONS_AT_ONCE; int32."""
        rounds = -(-len(hidden) // self._at_once)
        arrays = np.zeros((3, rounds * self._at_once), dtype=np.int32)
        arrays[0, : len(hidden)] = hidden
        arrays[1, : len(hidden)] = targets
        arrays[2] = np.arange(arrays.shape[1]) % self._at_once
        arrays[2, len(hidden) :] = -1
        return list(arrays)

    def _gather(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        entries: torch.Tensor,
        request: LogprobsRequest,
        compute: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
    ) -> None:
        token_ids = self._rows.arena.index_select(0, targets)
        out, num_top = request.out, int(request.num_top.max())
        for begin in range(0, len(positions), self._at_once):
            part = slice(begin, begin + self._at_once)
            states = hidden.index_select(0, positions[part])
            logits = self._compute_logits(states) if compute is None else compute(states, part)
            gather_logprobs(
                logits,
                index=entries[part],
                chosen=token_ids[part][None],
                slot=self._slot,
                num_top=min(num_top, logits.shape[1]),
                workspace=self._workspace,
                out=Logprobs(out.sampled[part], out.top_ids[part], out.top_logprobs[part]),
            )

    def _pool(
        self,
        hidden: torch.Tensor,
        work: PromptWork,
        arrays: Sequence[torch.Tensor],
        logprobs: LogprobsRequest | None,
    ) -> PromptTransfer:
        self._turn = (self._turn + 1) % NUM_TURNS
        out, host = self._pooled[self._turn], self._pooled_host[self._turn]
        if work.pooled:
            pool_hidden(hidden, PooledColumns(*arrays), sums=self._sums, out=out)
        complete = slice(sum(chunk.divisor > 0 for chunk in work.pooled))
        finished = self._finish_pooled(out[complete]) if complete.stop else out[complete]
        return PromptTransfer(work, logprobs, finished, host[complete])


def _of_part(
    compute_logits: Callable[[torch.Tensor, IntArray], torch.Tensor],
    positions: IntArray,
    states: torch.Tensor,
    part: slice,
) -> torch.Tensor:
    return compute_logits(states, positions[part])


def _pooled_arrays(chunks: Sequence[PooledChunk], begins: IntArray) -> list[np.ndarray]:
    """The fields of PooledColumns, in order."""
    columns = np.empty((6, len(chunks)), dtype=np.int32)
    num_complete = 0
    for i, chunk in enumerate(chunks):
        first = begins[chunk.index]
        place = num_complete if chunk.divisor else -1
        num_complete += chunk.divisor > 0
        columns[:, i] = (
            chunk.row,
            first + chunk.begin,
            first + chunk.end,
            chunk.continues,
            chunk.divisor,
            place,
        )
    return list(columns)
