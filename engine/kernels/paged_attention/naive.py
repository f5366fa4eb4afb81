"""The definition of paged attention, one token and one head at a time.

Slow on purpose; tests compare the backends to it.
"""

from __future__ import annotations

import math

import torch


def naive_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    query_start_loc: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each request's last tokens over its whole context, computed in fp64.

    Args:
        query: [T, H, D]; request i owns rows query_start_loc[i] to query_start_loc[i + 1], which are the
            last tokens of its context.
        key_cache, value_cache: [num_blocks, block_size, HK, D]; query head h attends to head h // (H / HK).
        seq_lens: context of each request, its new tokens included.
        block_table: [S, B] block ids in sequence order.
        scale: what scores q.k are multiplied with.
        sliding_window: a token sees itself and this number less one before it; 0 for no limit.
        soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap); 0 for no cap.
        alibi_slopes: [H]; what is taken from a score for each token between key and query.
        sinks: [H]; one more score, of a key whose value is zero.
        kv_scales: [2]; what keys and values are multiplied with.

    Returns:
        [T, H, D] in the query's dtype.
    """
    output = torch.empty_like(query)
    block_size = key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    key_scale, value_scale = (1.0, 1.0) if kv_scales is None else kv_scales.double().tolist()
    for request, seq_len in enumerate(seq_lens):
        begin, end = query_start_loc[request], query_start_loc[request + 1]
        positions = range(seq_len)
        blocks = [int(block_table[request, p // block_size]) for p in positions]
        keys = torch.stack([key_cache[b, p % block_size] for b, p in zip(blocks, positions, strict=True)])
        values = torch.stack([value_cache[b, p % block_size] for b, p in zip(blocks, positions, strict=True)])
        for token in range(begin, end):
            visible = seq_len - (end - 1 - token)
            oldest = max(0, visible - (sliding_window or visible))
            for head in range(query.shape[1]):
                k = keys[oldest:visible, head // group].double() * key_scale
                v = values[oldest:visible, head // group].double() * value_scale
                scores = k @ query[token, head].double() * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if alibi_slopes is not None:
                    distance = torch.arange(len(k) - 1, -1, -1, device=k.device).double()
                    scores -= float(alibi_slopes[head]) * distance
                sink = -math.inf if sinks is None else float(sinks[head])
                highest = max(float(scores.max()), sink)
                weights = torch.exp(scores - highest)
                total = weights.sum() + math.exp(sink - highest)
                output[token, head] = (weights @ v / total).to(query.dtype)
    return output
