"""Which steps cuDNN attends for, and that it attends right over the paged pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.attention.backend import LayerKVCache
from engine.attention.equal_prompts import EqualPrompts

CUDA = torch.device("cuda")


def prompts(**changes: object) -> EqualPrompts:
    arguments = {"head_dim": 128, "dtype": torch.bfloat16, "device": CUDA, "allowed": True, **changes}
    return EqualPrompts(**arguments)  # type: ignore[arg-type]


def length(equal: EqualPrompts, starts: list[int], counts: list[int]) -> int:
    return equal.length(np.array(starts), np.array(counts))


def test_a_combination_is_taken_when_it_comes_again() -> None:
    equal = prompts()
    assert [length(equal, [0] * 4, [1024] * 4) for _ in range(3)] == [0, 1024, 1024]
    assert length(equal, [0] * 3, [1024] * 3) == 0
    assert length(equal, [0] * 3, [1024] * 3) == 1024


@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0, 0], [1024, 1023]), ([0, 16], [1024, 1024]), ([0, 0], [511, 511]), ([], []), ([700], [1])],
    ids=["unequal", "with context", "short", "nothing", "decode"],
)
def test_other_steps_are_never_taken(starts: list[int], counts: list[int]) -> None:
    equal = prompts()
    assert [length(equal, starts, counts) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    "changes",
    [{"allowed": False}, {"dtype": torch.float32}, {"head_dim": 256}, {"device": torch.device("cpu")}],
    ids=str,
)
def test_it_is_not_used_where_it_does_not_suit(changes: dict[str, object]) -> None:
    equal = prompts(**changes)
    assert [length(equal, [0], [2048]) for _ in range(3)] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (16, 8, 128)])
@pytest.mark.parametrize(("count", "size"), [(4, 2048), (1, 513), (3, 1000)])
def test_prompts_attend_as_by_the_plain_definition(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, count: int, size: int
) -> None:
    equal = prompts(head_dim=head_dim, dtype=dtype)
    num_tokens = count * size
    num_blocks = -(-num_tokens // 16)
    qkv = torch.randn(num_tokens, (num_heads + 2) * head_dim, device=CUDA, dtype=dtype)
    query = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    pool = torch.full((2, num_blocks, 16, num_kv_heads, head_dim), float("nan"), device=CUDA, dtype=dtype)
    cache = LayerKVCache(pool[0], pool[1])
    blocks = torch.randperm(num_blocks, device=CUDA)
    tokens = torch.arange(num_tokens, device=CUDA)
    slots = blocks[tokens // 16] * 16 + tokens % 16
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim, device=CUDA, dtype=dtype)
    cache.key[slots // 16, slots % 16] = key
    cache.value[slots // 16, slots % 16] = value
    scale = head_dim**-0.5
    attended = equal.attend(query, cache, slots.int(), size, scale)
    assert attended is not None
    q, k, v = (x.float().unflatten(0, (count, size)).transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(attended.float(), expected.transpose(1, 2).flatten(0, 1), atol=2e-2, rtol=2e-2)
