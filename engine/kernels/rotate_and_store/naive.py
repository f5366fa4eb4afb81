"""The definition of rotating queries and keys and storing keys and values, one token at a time."""

from __future__ import annotations

import torch


def naive_rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Everything in fp32, rounded once.

    Args: as the kernel's, but qkv is left as it is.

    Returns:
        The queries, [T, H, D]; the caches' slots are written.
    """
    num_tokens, block_size = len(qkv), key_cache.shape[1]
    heads = qkv.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = heads.clone().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    for token in range(num_tokens):
        angles = None
        if table is not None and positions is not None:
            angles = table[positions[token]].float()
        query[token] = _rotate(query[token], angles, interleaved, q_norm, eps)
        key[token] = _rotate(key[token], angles, interleaved, k_norm, eps)
        slot = int(slot_mapping[token])
        if slot >= 0:
            for number, (cache, own) in enumerate(((key_cache, key), (value_cache, value))):
                stored = own[token]
                if kv_scales is not None:
                    largest = torch.finfo(cache.dtype).max
                    stored = (stored.float() / kv_scales[number]).clamp(-largest, largest)
                cache[slot // block_size, slot % block_size] = stored.to(cache.dtype)
    return query


def _rotate(
    heads: torch.Tensor,
    angles: torch.Tensor | None,
    interleaved: bool,
    norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """[H, D] -> [H, D], after the optional RMSNorm; angles are the cosines and sines of R/2 pairs, [R]."""
    wide = heads.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm.float()
    if angles is not None:
        for pair, (cos, sin) in enumerate(zip(*angles.chunk(2), strict=True)):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + len(angles) // 2)
            first, second = wide[:, a].clone(), wide[:, b].clone()
            wide[:, a], wide[:, b] = first * cos - second * sin, second * cos + first * sin
    return wide.to(heads.dtype)
