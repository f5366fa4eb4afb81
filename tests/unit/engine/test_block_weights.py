"""Matrices in GGML's blocks: what they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from safetensors.torch import save_file

from engine.loader.blocks import dequantize
from engine.loader.checkpoint import open_checkpoint
from pagewire.base.errors import ConfigError
from pagewire.base.gguf_blocks import KEPT, METADATA_KEY, block_size


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.filterwarnings("ignore:invalid value")  # random scales are infinite now and then
def test_any_bytes_are_the_numbers_that_the_gguf_package_makes_of_them(kind: str) -> None:
    values, num_bytes = block_size(kind)
    raw = np.random.default_rng(1).integers(0, 256, (7, 3 * num_bytes), dtype=np.uint8)
    ours = dequantize(torch.from_numpy(raw), kind, torch.float32)
    assert ours.shape == (7, 3 * values)
    expected = gguf_dequantize(raw, GGMLQuantizationType[kind])
    assert np.array_equal(ours.numpy(), expected, equal_nan=True)


def test_of_a_matrix_without_numbers_only_the_shape_is_known() -> None:
    meta = torch.empty(4, 36, dtype=torch.uint8, device="meta")
    numbers = dequantize(meta, "Q4_0", torch.bfloat16)
    assert (numbers.shape, numbers.dtype, numbers.device.type) == ((4, 64), torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"weight": "Q2_K"}, "Q2_K"),
        ({"weight": "Q4_K"}, "a multiple of 144"),
        ({"weight": 3}, "blocks of 3"),
        (["weight"], "not an object"),
        ("{", "not JSON"),
    ],
)
def test_blocks_that_cannot_be_are_refused(tmp_path: Path, metadata: object, said: str) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    tensors = {"weight": torch.zeros(4, 36, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(tmp_path)
