"""How much of a GPU is left for the KV pool, found by running the largest step once."""

from __future__ import annotations

import numpy as np
import torch

from engine.dispatch.records import U32, NewRequest, SamplingRecord, StepPlan, u32
from engine.model_runner import ModelRunner


def largest_plan(runner: ModelRunner) -> StepPlan:
    """A step of max_num_batched_tokens new prompt tokens in as few requests as hold them, all sampling.

    The requests share the blocks from 0 on, so that the pool needs no more than one longest request takes.
    """
    rows = runner.rows.limits
    remaining = runner.max_num_batched_tokens
    requests: list[NewRequest] = []
    while remaining > 0 and len(requests) < rows.max_num_seqs:
        count = min(remaining, rows.max_model_len - 1, rows.num_pool_blocks * rows.block_size)
        blocks = np.arange(-(-count // rows.block_size), dtype=U32)
        requests.append(
            NewRequest(len(requests), np.zeros(count, dtype=U32), count, blocks, SamplingRecord())
        )
        remaining -= count
    counts = [len(request.token_ids) for request in requests]
    zeros = u32([0] * len(requests))
    return StepPlan(
        step_id=0,
        freed_rows=u32([]),
        new_requests=requests,
        rows=u32(range(len(requests))),
        starts=zeros,
        counts=u32(counts),
        samples=u32([1] * len(requests)),
        num_new_blocks=zeros,
        new_block_ids=u32([]),
    )


def cuda_bytes_for_kv(runner: ModelRunner, utilization: float) -> int:
    """Bytes left of `utilization` of the GPU after weights, the largest step and other processes' memory.

    Args:
        runner: one with a pool just large enough for `largest_plan`; its own memory counts as activations,
            which errs on the safe side.

    Raises:
        RuntimeError: the largest step fails.
    """
    device = runner.device
    torch.cuda.reset_peak_memory_stats(device)
    result = runner.launch(largest_plan(runner)).result()
    runner.reset()
    if result.error:
        raise RuntimeError(f"a step of {runner.max_num_batched_tokens} tokens failed: {result.error}")
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    outside_torch = total - free - torch.cuda.memory_reserved(device)
    return int(total * utilization) - outside_torch - peak
