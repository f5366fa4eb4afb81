"""What only some requests ask for, done behind the step for their rows alone: log probabilities, penalties
and token lists. A step without such requests launches nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import IntArray
from engine.cuda.rows import DeviceRows
from engine.cuda.step_shape import StepColumns
from engine.dispatch.records import TokenLogprobs
from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.sampling.parameters import SamplingBatch, subset
from engine.sampling.penalties import apply_penalties, apply_token_lists


@dataclass(slots=True)
class LogprobsRequest:
    """Log probabilities of some of a step's tokens, on their way to the host.

    Attributes:
        index: which of the result's tokens, [L].
        num_top: top entries of each, [L].
        values: of the sampled token, then of the likeliest, [L, 1 + the largest num_top] fp32.
        top_ids: the likeliest, [L, the largest num_top].
    """

    index: IntArray
    num_top: IntArray
    values: torch.Tensor
    top_ids: torch.Tensor
    host_values: torch.Tensor | None = None
    host_top_ids: torch.Tensor | None = None

    def to_host(self) -> None:
        """Starts the copies, on the current stream."""
        self.host_values = _to_host(self.values)
        self.host_top_ids = _to_host(self.top_ids)

    def by_index(self) -> dict[int, TokenLogprobs]:
        """The entries of a step's result, once the copies are over."""
        assert self.host_values is not None
        assert self.host_top_ids is not None
        values, top_ids = self.host_values.numpy(), self.host_top_ids.numpy().astype(np.uint32)
        return {
            int(index): TokenLogprobs(float(values[i, 0]), top_ids[i, :count], values[i, 1 : 1 + count])
            for i, (index, count) in enumerate(zip(self.index, self.num_top, strict=True))
        }


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class UnusualRows:
    """Runs behind the main sampling, on the same stream."""

    def __init__(self, rows: DeviceRows, out_token_ids: torch.Tensor, workspace: SamplingWorkspace) -> None:
        self._rows = rows
        self._out_token_ids = out_token_ids
        self._workspace = workspace

    def after_sampling(
        self,
        batch: SamplingBatch,
        slots: IntArray,
        plan_order: IntArray,
        logits: torch.Tensor,
        columns: StepColumns[torch.Tensor],
    ) -> LogprobsRequest | None:
        """Samples again, from adjusted logits, for requests that adjust them; then takes the log
        probabilities that requests asked for.

        Args:
            batch: the parameters of the step's requests.
            slots: where each request of the batch stands in the step.
            plan_order: the requests that sample, as indices into the batch, in the order of the result.
            logits: raw, [S, vocab].
            columns: of the step.
        """
        adjusts = batch.columns["has_penalties"] | batch.columns["has_lists"]
        asks = batch.columns["logprobs"] >= 0
        if not adjusts.any() and not asks.any():
            return None
        adjusted = plan_order[adjusts[plan_order]]
        if len(adjusted):
            self._resample(subset(batch, adjusted), slots[adjusted], logits, columns)
        index = np.flatnonzero(asks[plan_order])
        if not len(index):
            return None
        asked = plan_order[index]
        return self._logprobs(index, batch.columns["logprobs"][asked], slots[asked], logits, columns)

    def rehearse(self, logits: torch.Tensor, columns: StepColumns[torch.Tensor]) -> None:
        """Launches for nobody what only some requests ask for, so that the first of them need not wait for
        the compiler."""
        nobody = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
        self._sample(logits[:1].float(), nobody, columns)

    def _resample(
        self, batch: SamplingBatch, slots: IntArray, logits: torch.Tensor, columns: StepColumns[torch.Tensor]
    ) -> None:
        index = torch.from_numpy(slots.astype(np.int32)).to(logits.device, non_blocking=True)
        adjusted = logits.index_select(0, index).float()
        apply_token_lists(adjusted, batch)
        apply_penalties(adjusted, batch, self._rows.token_ids)
        self._sample(adjusted, index, columns)

    def _sample(self, logits: torch.Tensor, index: torch.Tensor, columns: StepColumns[torch.Tensor]) -> None:
        sample_rows(
            logits,
            columns=sampling_columns(columns),
            token_ids=self._rows.token_ids,
            out_token_ids=self._out_token_ids,
            out_largest=None,
            slot=columns.result,
            workspace=self._workspace,
            index=index,
        )

    def _logprobs(
        self,
        index: IntArray,
        num_top: IntArray,
        slots: IntArray,
        logits: torch.Tensor,
        columns: StepColumns[torch.Tensor],
    ) -> LogprobsRequest:
        slot = torch.from_numpy(slots.astype(np.int64)).to(logits.device, non_blocking=True)
        chosen = self._out_token_ids[columns.result.long()].index_select(1, slot).long().T
        logprobs = logits.index_select(0, slot).float().log_softmax(dim=-1)
        top = logprobs.topk(min(int(num_top.max()), logits.shape[1]), dim=-1)
        values = torch.cat((logprobs.gather(1, chosen), top.values), dim=1)
        return LogprobsRequest(index, num_top, values, top.indices)


def sampling_columns(columns: StepColumns[torch.Tensor]) -> SamplingColumns:
    """The part of a step's columns that says how its slots sample."""
    return SamplingColumns(
        temperature=columns.temperature,
        top_k=columns.top_k,
        top_p=columns.top_p,
        min_p=columns.min_p,
        draw=columns.draws,
        rows=columns.sampling_rows,
        positions=columns.positions,
    )
