"""Products of matrices as files have them, against the numbers that the gguf package reads there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from engine.cpu.kernels.blocks import BLOCK_KINDS, BlockKind
from engine.cpu.kernels.library import NativeLibrary, PackedMatrix

# Where a block has its scales and mins in half precision.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208],
}  # fmt: skip


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
BLOCKS = {name: kind for name, kind in BLOCK_KINDS.items() if name in HALVES}
SIXTEEN_BITS = [BLOCK_KINDS["BF16"], BLOCK_KINDS["F16"]]


def random_rows(kind: BlockKind, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Rows as a file has them, any bits at all, and what they stand for."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // kind.columns, kind.num_bytes), dtype=np.uint8)
    for at in HALVES[kind.name]:
        scales = (rng.standard_normal(blocks.shape[:2]) * 0.01).astype(np.float16)
        blocks[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
    data = blocks.reshape(rows, -1)
    return torch.from_numpy(data), quants.dequantize(data, GGMLQuantizationType[kind.name])


def rounded(x: torch.Tensor) -> np.ndarray:
    """What a product sees of x: each 32 numbers in 8 bits."""
    parts = x.numpy().reshape(len(x), -1, 32)
    most = np.abs(parts).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    steps = np.rint(parts * inverse).astype(np.float64) * (most / np.float32(127))
    return steps.reshape(x.shape)


def packed(
    native: NativeLibrary, kind: BlockKind, rows: int, columns: int
) -> tuple[PackedMatrix, np.ndarray]:
    data, weights = random_rows(kind, rows, columns)
    return native.pack(kind, data, columns), weights


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(
    "shape", [(48, 256, 1), (37, 512, 2), (5, 768, 3), (100, 256, 25), (1, 256, 64)], ids=str
)
def test_products_are_those_of_the_files_numbers(
    native: NativeLibrary, kind: BlockKind, shape: tuple[int, int, int]
) -> None:
    rows, columns, num_tokens = shape
    matrix, weights = packed(native, kind, rows, columns)
    torch.manual_seed(0)
    x, bias = torch.randn(num_tokens, columns), torch.randn(rows)
    exact = rounded(x) @ weights.T.astype(np.float64)
    for added in (None, bias):
        expected = exact if added is None else exact + added.numpy()
        out = native.multiply(x, matrix, added).numpy()
        assert np.abs(out - expected).max() < 1e-6 * np.abs(expected).max()


def test_a_product_reads_rows_apart_from_each_other(native: NativeLibrary) -> None:
    matrix, weights = packed(native, BLOCK_KINDS["Q8_0"], 32, 64)
    wide = torch.randn(5, 200)
    out = native.multiply(wide[:, 30:94], matrix).numpy()
    expected = rounded(wide[:, 30:94].contiguous()) @ weights.T.astype(np.float64)
    assert np.abs(out - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
def test_extreme_bits_do_not_overflow(native: NativeLibrary, kind: BlockKind) -> None:
    """All weights at their largest and smallest, and all activations at theirs."""
    columns = 256
    data = torch.stack(
        [torch.full((kind.row_bytes(columns),), bits, dtype=torch.uint8) for bits in (255, 0, 128)]
    )
    blocks = data.view(3, -1, kind.num_bytes)
    for at in HALVES[kind.name]:
        blocks[:, :, at : at + 2] = torch.from_numpy(np.array([0.01], np.float16).view(np.uint8))
    weights = quants.dequantize(data.numpy(), GGMLQuantizationType[kind.name])
    x = torch.tensor([[1.0], [-1.0]]).expand(2, columns).contiguous()
    out = native.multiply(x, native.pack(kind, data, columns)).numpy()
    expected = x.numpy().astype(np.float64) @ weights.T.astype(np.float64)
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_zeros_and_the_largest_numbers_stay_finite(native: NativeLibrary) -> None:
    matrix, _ = packed(native, BLOCK_KINDS["Q4_1"], 16, 64)
    assert torch.equal(native.multiply(torch.zeros(2, 64), matrix), torch.zeros(2, 16))
    assert native.multiply(torch.full((1, 64), 1e30), matrix).isfinite().all()


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
def test_rows_are_looked_up_exactly(native: NativeLibrary, kind: BlockKind) -> None:
    matrix, weights = packed(native, kind, 50, 256)
    ids = torch.tensor([0, 49, 16, 15, 16])
    assert np.array_equal(native.embed(ids, matrix).numpy(), weights[ids.numpy()])


def test_rows_of_another_length_are_refused(native: NativeLibrary) -> None:
    kind = BLOCK_KINDS["Q4_K"]
    with pytest.raises(ValueError, match="Q4_K keeps 256 columns together; these are 288"):
        native.pack(kind, torch.zeros(4, 162, dtype=torch.uint8), 288)
    with pytest.raises(ValueError, match="a row of 256 columns has 144 bytes in Q4_K, not 100"):
        native.pack(kind, torch.zeros(4, 100, dtype=torch.uint8), 256)


@pytest.mark.parametrize("kind", SIXTEEN_BITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "shape", [(48, 61, 1), (37, 1100, 22), (5, 96, 3), (33, 513, 130), (1, 2, 64), (100, 1, 7)], ids=str
)
def test_products_with_16_bits_are_those_of_fp32(
    native: NativeLibrary, kind: BlockKind, shape: tuple[int, int, int]
) -> None:
    rows, columns, num_tokens = shape
    torch.manual_seed(0)
    weights = torch.randn(rows, columns).to(DTYPES[kind.name])
    matrix = native.pack(kind, weights.view(torch.uint8), columns)
    wide, bias = torch.randn(num_tokens, columns + 3), torch.randn(rows)
    x = wide[:, 2 : columns + 2]
    exact = x.double() @ weights.double().T
    scale = x.double().abs() @ weights.double().abs().T + 1
    for added in (None, bias):
        expected = exact if added is None else exact + added
        assert ((native.multiply(x, matrix, added) - expected).abs() < 1e-6 * scale).all()


@pytest.mark.parametrize("kind", SIXTEEN_BITS, ids=lambda kind: kind.name)
def test_every_number_of_16_bits_is_read_exactly(native: NativeLibrary, kind: BlockKind) -> None:
    numbers = torch.arange(65536).to(torch.uint16).view(DTYPES[kind.name])[:, None]
    matrix = native.pack(kind, numbers.contiguous().view(torch.uint8), 1)
    expected = numbers.float().nan_to_num(12345.0, torch.inf, -torch.inf)
    embedded = native.embed(torch.arange(65536), matrix).nan_to_num(12345.0, torch.inf, -torch.inf)
    product = native.multiply(torch.ones(1, 1), matrix).T.nan_to_num(12345.0, torch.inf, -torch.inf)
    assert torch.equal(embedded, expected)
    assert torch.equal(product, expected)


def matrix_of(native: NativeLibrary, kind: BlockKind) -> PackedMatrix:
    if kind.columns > 1:
        return packed(native, kind, 37, 512)[0]
    numbers = torch.randn(37, 1101, generator=torch.Generator().manual_seed(1)).to(DTYPES[kind.name])
    return native.pack(kind, numbers.view(torch.uint8), 1101)


@pytest.mark.parametrize("kind", BLOCK_KINDS.values(), ids=BLOCK_KINDS)
def test_a_token_has_the_same_bits_among_any_number_of_others(native: NativeLibrary, kind: BlockKind) -> None:
    matrix = matrix_of(native, kind)
    x = torch.randn(140, matrix.columns, generator=torch.Generator().manual_seed(0))
    together = native.multiply(x, matrix)
    for count in (1, 2, 5, 17):
        parts = [native.multiply(part, matrix) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together), count


def integers(
    native: NativeLibrary, bits: int, columns: int, group_size: int, codes: torch.Tensor | None = None
) -> tuple[PackedMatrix, np.ndarray]:
    """A matrix of integers in groups, and what it stands for."""
    generator = torch.Generator().manual_seed(bits)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    if codes is None:
        codes = torch.randint(low, high, (37, columns), generator=generator).to(dtype)
    num_groups = -(-columns // group_size)
    scales, minima = (torch.randn(len(codes), num_groups, generator=generator) * 0.01 for _ in range(2))
    spread = [each.repeat_interleave(group_size, 1)[:, :columns].double() for each in (scales, minima)]
    matrix = native.pack_groups(bits, codes, scales, minima, group_size)
    return matrix, (codes.double() * spread[0] + spread[1]).numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 96, 96), (7, 256, 32), (70, 416, 128)], ids=str)
def test_products_of_integers_in_groups(
    native: NativeLibrary, bits: int, shape: tuple[int, int, int]
) -> None:
    """The last group of the last shape is shorter."""
    num_tokens, columns, group_size = shape
    matrix, weights = integers(native, bits, columns, group_size)
    x = torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(0))
    expected = rounded(x) @ weights.T
    out = native.multiply(x, matrix)
    assert np.abs(out.numpy() - expected).max() < 1e-6 * np.abs(expected).max() + 1e-5
    for token in (0, num_tokens - 1):
        assert torch.equal(native.multiply(x[token : token + 1], matrix)[0], out[token])
    ids = torch.tensor([0, 36, 16])
    np.testing.assert_allclose(native.embed(ids, matrix).numpy(), weights[ids.numpy()], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(4, 0, 15), (8, -128, 127)])
def test_extreme_integers_do_not_overflow(
    native: NativeLibrary, bits: int, lowest: int, highest: int
) -> None:
    dtype = torch.uint8 if bits == 4 else torch.int8
    codes = torch.tensor([[lowest], [highest]]).to(dtype).expand(2, 256)
    matrix, weights = integers(native, bits, 256, 64, codes)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 256).contiguous()
    expected = x.numpy().astype(np.float64) @ weights.T
    assert np.abs(native.multiply(x, matrix).numpy() - expected).max() < 1e-5 * np.abs(expected).max()
