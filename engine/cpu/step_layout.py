"""What one step feeds the model, laid out from a plan and the worker's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.interface import BatchLayout, IntArray
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.drafts import DraftTokens
from engine.cpu.rows import RequestRows
from engine.dispatch.records import StepPlan
from engine.layers.adapters import AdapterBatch
from engine.layers.step_context import StepContext
from engine.models.base import CausalLM


@dataclass(slots=True)
class StepInputs:
    """One step on the host: T tokens of S requests, of which some sample.

    Attributes:
        token_index: of each token, into the flattened rows' token ids, [T].
        positions: in its sequence, [T].
        layouts: of the batch in each KV group, for the attention backend.
        begins: where each request's tokens begin, in the plan's order.
        logits_indices: the tokens whose logits are needed, in the plan's order of sampling requests.
        sampling_rows: the rows that sample, in the plan's order, once for each of their slots.
        sampling_positions: where each sampled token goes.
        num_slots: of each request that samples, in the plan's order: one, and one more for each draft that
            the step verifies; none for a request that steps before this one have taken to its end.
        adapter_slots: of each token's adapter, -1 for none, [T]; None where no request has one.
    """

    token_index: IntArray
    positions: IntArray
    layouts: list[BatchLayout]
    begins: IntArray
    logits_indices: IntArray
    sampling_rows: IntArray
    sampling_positions: IntArray
    num_slots: IntArray
    adapter_slots: IntArray | None = None


def prepare_inputs(
    plan: StepPlan, rows: RequestRows, starts: IntArray, drafts: DraftTokens | None = None
) -> StepInputs:
    """Lays out the scheduled tokens of a plan that `rows` has applied and checked.

    A draft is one more request that computes one token: it is in its row already, and sees those before it,
    whose keys and values every layer stores before it attends. Requests are reordered for the attention
    backend: those that compute one token first, longest first.

    Args:
        starts: where each request starts.
        drafts: what the step verifies.
    """
    plan_rows, plan_starts = plan.rows.astype(np.int64), starts
    plan_counts, samples = plan.counts.astype(np.int64), plan.samples != 0
    num_slots, first = np.ones(len(plan_rows), np.int64), np.arange(len(plan_rows))
    if drafts is not None:
        num_slots = drafts.num_slots
        first = np.cumsum(num_slots) - num_slots
        offsets = np.arange(int(num_slots.sum())) - np.repeat(first, num_slots)
        columns = (plan_rows, plan_starts, plan_counts, samples)
        plan_rows, plan_starts, plan_counts, samples = (np.repeat(each, num_slots) for each in columns)
        plan_starts = plan_starts + offsets
    ends = plan_starts + plan_counts
    order = np.lexsort((-ends, plan_counts > 1))
    row, count, start, end = plan_rows[order], plan_counts[order], plan_starts[order], ends[order]
    last = np.cumsum(count) - 1
    token_row = np.repeat(row, count)
    positions = np.arange(len(token_row)) + np.repeat(start - (last + 1 - count), count)
    block_size = rows.limits.block_size
    index, offsets = positions // block_size, positions % block_size
    num_blocks = -(-int(end.max()) // block_size)
    layouts = [
        BatchLayout(
            counts=count,
            seq_lens=end,
            block_table=rows.block_tables[group, row, :num_blocks],
            slot_mapping=rows.block_tables[group, token_row, index] * block_size + offsets,
            block_size=block_size,
        )
        for group in range(rows.limits.num_kv_groups)
    ]
    last_in_plan_order = np.empty_like(last)
    last_in_plan_order[order] = last
    begins = last_in_plan_order + 1 - plan_counts
    return StepInputs(
        token_index=token_row * rows.limits.max_model_len + positions,
        positions=positions,
        layouts=layouts,
        begins=begins[np.minimum(first, len(begins) - 1)],
        logits_indices=last_in_plan_order[samples],
        sampling_rows=plan_rows[samples],
        sampling_positions=ends[samples],
        num_slots=num_slots[plan.samples != 0],
        adapter_slots=_adapter_slots(rows, token_row),
    )


def _adapter_slots(rows: RequestRows, token_row: IntArray) -> IntArray | None:
    if not rows.limits.max_loras:
        return None
    slots: IntArray = rows.adapter_slots[token_row]
    return slots if (slots >= 0).any() else None


def make_context(
    model: CausalLM,
    backend: TorchAttentionBackend,
    positions: torch.Tensor,
    layouts: Sequence[BatchLayout],
    adapters: AdapterBatch | None = None,
) -> StepContext:
    """What the layers of a model are told of a step: its tokens' positions, [T] int64, the batch's layout in
    each KV group, and the tokens' adapters."""
    return StepContext(
        positions,
        attention=[backend.prepare(layout) for layout in layouts],
        rotations=[backend.rotation(table, positions) for table in model.rotary_tables],
        adapters=adapters,
    )
