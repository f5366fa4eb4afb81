"""The definition of rotating queries and keys and storing keys and values, one token and head at a time."""

from __future__ import annotations

import torch


def naive_rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything in fp32, rounded once.

    Args: as the kernel's.

    Returns:
        The query [T, H, D] and the keys then values [T, 2 * HK, D]; the caches' slots are written.
    """
    num_tokens, block_size = len(qkv), key_cache.shape[1]
    heads = qkv.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    query = heads[:, :num_heads].clone()
    key_value = heads[:, num_heads:].clone()
    for token in range(num_tokens):
        cos, sin = table[positions[token]].float().chunk(2)
        for head in range(num_heads):
            query[token, head] = _rotate(heads[token, head], cos, sin, q_norm, eps).to(qkv.dtype)
        for head in range(num_kv_heads):
            key = _rotate(heads[token, num_heads + head], cos, sin, k_norm, eps)
            key_value[token, head] = key.to(qkv.dtype)
        slot = int(slot_mapping[token])
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = key_value[token, :num_kv_heads]
            value_cache[slot // block_size, slot % block_size] = key_value[token, num_kv_heads:]
    return query, key_value


def _rotate(
    head: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """[D] -> [D] fp32: channel i pairs with i + D/2 (arXiv:2104.09864), after the optional RMSNorm."""
    head = head.float()
    if norm is not None:
        head = head * torch.rsqrt(head.square().mean() + eps) * norm.float()
    first, second = head.chunk(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin))
