"""How the layers of a model are cut into KV groups, and the pool that serves them."""

from __future__ import annotations

import pytest
import torch

from engine.models.kv_groups import kv_groups
from engine.platform.kv_cache import KVCacheShape, allocate_kv_pool, size_kv_cache


def every(period: int, num_layers: int, window: int) -> tuple[int, ...]:
    """Every `period`-th layer sees everything."""
    return tuple(0 if layer % period == period - 1 else window for layer in range(num_layers))


@pytest.mark.parametrize(
    ("layers", "max_model_len", "windows", "group_size"),
    [
        pytest.param(every(6, 18, 512), 32_768, (0, *[512] * 5), 3, id="Gemma 3 270M"),
        pytest.param(every(6, 62, 1024), 131_072, (0, *[1024] * 6), 10, id="Gemma 3 27B"),
        pytest.param(every(2, 42, 4096), 8192, (0, 4096), 21, id="Gemma 2 9B"),
        pytest.param(every(2, 24, 128), 131_072, (0, 128), 12, id="gpt-oss 20B"),
        pytest.param((4096,) * 32, 32_768, (4096,), 32, id="Mistral 7B v0.1"),
        pytest.param((4096,) * 32, 4096, (0,), 32, id="a window as long as requests"),
        pytest.param((0,) * 36, 40_960, (0,), 36, id="full attention"),
        pytest.param((0,) * 27 + (4096,), 32_768, (0,), 28, id="one window is not worth groups"),
        pytest.param((0,) * 21 + (4096,) * 7, 32_768, (0, 0, 0, 4096), 7, id="the last layers have windows"),
        pytest.param((100, 10, 0), 1000, (0, 100, 10), 1, id="two windows"),
        pytest.param(tuple(range(10, 30)), 1000, (29,), 20, id="more windows than groups"),
    ],
)
def test_layers_of_equal_reach_form_groups_of_equal_size(
    layers: tuple[int, ...], max_model_len: int, windows: tuple[int, ...], group_size: int
) -> None:
    groups = kv_groups(layers, max_model_len)
    assert groups.windows == windows
    assert groups.group_size == group_size
    places = list(zip(groups.group_of, groups.place_of, strict=True))
    assert len(set(places)) == len(layers), "no two layers have the same place in the same group"
    assert all(0 <= place < group_size for place in groups.place_of)
    for layer, group in zip(layers, groups.group_of, strict=True):
        reach = windows[group] or max_model_len
        assert min(layer or max_model_len, max_model_len) <= reach, "no layer sees more than its group"


def test_a_block_has_the_layers_of_one_group() -> None:
    groups = kv_groups(every(3, 5, 8), 1000)
    shape = KVCacheShape(groups, num_kv_heads=2, head_dim=4, block_size=16, dtype=torch.float32)
    assert shape.block_bytes == 2 * groups.group_size * 16 * 2 * 4 * 4
    pool = allocate_kv_pool(shape, 7, torch.device("cpu"))
    assert len(pool.layers) == 5
    for layer, place in zip(pool.layers, groups.place_of, strict=True):
        assert layer.key.shape == layer.value.shape == (7, 16, 2, 4)
        assert layer.key.data_ptr() == pool.blocks[place, 0].data_ptr()
        assert layer.value.data_ptr() == pool.blocks[place, 1].data_ptr()


def test_requests_are_as_long_as_the_pool_holds_their_windows() -> None:
    groups = kv_groups(every(2, 2, 32), 1000)
    shape = KVCacheShape(groups, num_kv_heads=1, head_dim=4, block_size=16, dtype=torch.float32)
    size = size_kv_cache(shape, num_blocks=43, available_bytes=0, max_model_len=1000, max_num_seqs=4)
    assert (size.num_blocks, size.max_model_len) == (43, 40 * 16), "two blocks of a window, and one more"
    size = size_kv_cache(shape, num_blocks=None, available_bytes=1 << 30, max_model_len=1000, max_num_seqs=4)
    assert size.max_model_len == 1000
