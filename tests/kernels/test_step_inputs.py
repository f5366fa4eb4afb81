"""A step's inputs against their definition, from rows whose unused part would be noticed."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.step_inputs.kernel import (
    embed,
    fill_group_slots,
    prepare_chunks,
    prepare_decodes,
    scatter_words,
)
from engine.kernels.step_inputs.naive import (
    TokenInputs,
    naive_embed,
    naive_group_slots,
    naive_lengths,
    naive_scatter_words,
    naive_step_inputs,
)
from tests.kernels.hopper import compile_for_hopper, compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BLOCK_SIZE, MAX_MODEL_LEN, NUM_ROWS = 16, 1200, 9
POISON = -77
MODULE = "engine.kernels.step_inputs.kernel"


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def persistent_rows(num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids [R, L] and block_table [R, B], views of one arena as in the worker."""
    num_blocks = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    arena = torch.randint(1, 1 << 20, (num_rows * (MAX_MODEL_LEN + num_blocks),), dtype=torch.int32)
    arena = arena.to(DEVICE)
    token_ids = arena[: num_rows * MAX_MODEL_LEN].view(num_rows, MAX_MODEL_LEN)
    return token_ids, arena[num_rows * MAX_MODEL_LEN :].view(num_rows, num_blocks)


def poisoned_outputs(num_tokens: int, num_requests: int, slots: torch.dtype) -> dict[str, torch.Tensor]:
    """The arrays that a step writes."""
    outputs = {
        name: torch.full((num_tokens,), POISON, dtype=torch.int32, device=DEVICE)
        for name in ("input_ids", "positions")
    }
    outputs["slot_mapping"] = torch.full((num_tokens,), POISON, dtype=slots, device=DEVICE)
    outputs["seq_lens"] = torch.full((num_requests,), POISON, dtype=torch.int32, device=DEVICE)
    return outputs


def check(
    outputs: dict[str, torch.Tensor], expected: TokenInputs, tokens: int = 0, requests: int = 0
) -> None:
    """Equal from these offsets on; before and behind it, nothing was written."""
    for name, values in outputs.items():
        offset = requests if name == "seq_lens" else tokens
        wanted = getattr(expected, name)
        behind = len(values) - offset - len(wanted)
        assert values.tolist() == [POISON] * offset + wanted + [POISON] * behind, name


@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_requests", [1, 5, 129] + [512] * ON_GPU)
def test_decodes_equal_their_definition(num_requests: int, slots: torch.dtype) -> None:
    """Every third request is padding. A decode starts at the last token of its row, and counts one more."""
    token_ids, block_table = persistent_rows(num_requests)
    rows = [-1 if i % 3 == 1 else i * 5 % num_requests for i in range(num_requests)]
    rows = [-1 if row in rows[:i] else row for i, row in enumerate(rows)]
    lengths = torch.randint(1, MAX_MODEL_LEN + 1, (num_requests,)).tolist()
    lengths[0] = MAX_MODEL_LEN
    starts = [lengths[row] - 1 if row >= 0 else 0 for row in rows]
    outputs = poisoned_outputs(num_requests + 3, num_requests + 3, slots)
    on_device = int32(lengths)
    prepare_decodes(int32(rows), on_device, token_ids, block_table, block_size=BLOCK_SIZE, **outputs)
    assert on_device.tolist() == naive_lengths(lengths, rows, [start + 1 for start in starts])
    expected = naive_step_inputs(
        rows,
        starts,
        [1] * num_requests,
        token_ids,
        block_table,
        block_size=BLOCK_SIZE,
        num_tokens=num_requests,
    )
    check(outputs, expected)


CHUNKS = {
    # name: (rows, starts, counts, padding behind them)
    "one whole prompt": ([3], [0], [40], 0),
    "one token": ([8], [17], [1], 0),
    "chunks with context": ([2, 0, 7], [16, 5, 1100], [33, 16, 100], 27),
    "longer than a block, twice as long as announced": ([4, 1], [3, 0], [1150, 512], 3),
    "nothing but padding": ([-1, -1], [9, 0], [0, 0], 600),
    "padding requests with and without tokens": ([5, -1, -1, 6], [100, 70, 0, 0], [3, 4, 0, 2], 5),
}


@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_equal_their_definition(name: str, slots: torch.dtype) -> None:
    token_ids, block_table = persistent_rows()
    rows, starts, counts, padding = CHUNKS[name]
    query_start_loc = [7 + sum(counts[:i]) for i in range(len(counts) + 1)]
    total = sum(counts) + padding
    outputs = poisoned_outputs(7 + total + 2, 5 + len(rows) + 2, slots)
    sampling_rows = [row if i % 2 == 0 else -1 for i, row in enumerate(rows)]
    lengths = int32([POISON] * NUM_ROWS)
    prepare_chunks(
        int32(rows),
        int32(starts),
        int32(query_start_loc),
        int32(sampling_rows),
        lengths,
        token_ids,
        block_table,
        block_size=BLOCK_SIZE,
        num_tokens=7 + total,
        max_count=min(max(counts), 600),
        request_offset=5,
        **outputs,
    )
    expected = naive_step_inputs(
        rows, starts, counts, token_ids, block_table, block_size=BLOCK_SIZE, num_tokens=total
    )
    check(outputs, expected, tokens=7, requests=5)
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    assert lengths.tolist() == naive_lengths([POISON] * NUM_ROWS, sampling_rows, ends)


def test_chunks_may_be_parts_of_a_steps_arrays() -> None:
    """Behind two decodes, in arrays that begin anywhere."""
    token_ids, block_table = persistent_rows()
    outputs = poisoned_outputs(13, 4, torch.int32)
    prepare_chunks(
        int32([0, 0, 0, 3, 4])[3:],
        int32([0, 20, 6])[1:],
        int32([0, 1, 2, 7, 11])[2:],
        int32([0, 0, 0, -1, -1])[3:],
        int32([0] * NUM_ROWS),
        token_ids,
        block_table,
        block_size=BLOCK_SIZE,
        num_tokens=12,
        max_count=8,
        request_offset=2,
        **outputs,
    )
    expected = naive_step_inputs(
        [3, 4], [20, 6], [5, 4], token_ids, block_table, block_size=BLOCK_SIZE, num_tokens=10
    )
    check(outputs, expected, tokens=2, requests=2)


@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_decodes", [0, 1, 130])
@pytest.mark.parametrize("counts", [[], [1], [3, 0, 200, 1, 1, 17, 0]], ids=str)
def test_slots_in_further_groups_equal_their_definition(
    counts: list[int], num_decodes: int, slots: torch.dtype
) -> None:
    """Every third request and the last tokens are padding; each of three groups has its own block tables."""
    counts = [1] * num_decodes + counts
    num_tokens = sum(counts) + 3
    rows = [-1 if i % 3 == 1 else i % NUM_ROWS for i in range(len(counts))]
    query_start_loc = [sum(counts[:i]) for i in range(len(counts) + 1)]
    positions = torch.randint(MAX_MODEL_LEN, (num_tokens,)).tolist()
    tables = torch.stack([persistent_rows()[1] for _ in range(3)])
    mappings = torch.full((3, num_tokens + 2), POISON, dtype=slots, device=DEVICE)
    fill_group_slots(
        int32(rows),
        int32(query_start_loc),
        int32(positions),
        tables,
        block_size=BLOCK_SIZE,
        num_decodes=num_decodes,
        slot_mappings=mappings,
    )
    expected = naive_group_slots(rows, query_start_loc, positions, tables, block_size=BLOCK_SIZE)
    assert mappings[:, :num_tokens].tolist() == expected
    assert (mappings[:, num_tokens:] == POISON).all()


@pytest.mark.skipif(not ON_GPU, reason="needs 10 GB of rows")
def test_rows_beyond_two_to_the_31_words() -> None:
    token_ids = torch.zeros((16_400, 131_072), dtype=torch.int32, device=DEVICE)
    block_table = torch.zeros((16_400, 8192), dtype=torch.int32, device=DEVICE)
    token_ids[16_399, 131_070:] = int32([11, 12])
    block_table[16_399, 8191] = 99
    outputs = poisoned_outputs(2, 1, torch.int32)
    prepare_chunks(
        int32([16_399]), int32([131_070]), int32([0, 2]), int32([-1]), int32([0]), token_ids, block_table,
        block_size=BLOCK_SIZE, num_tokens=2, max_count=2, **outputs,
    )  # fmt: skip
    check(outputs, TokenInputs([11, 12], [131_070, 131_071], [99 * 16 + 14, 99 * 16 + 15], [131_072]))


@pytest.mark.parametrize("count", [0, 1, 17, 700])
def test_scattered_words_are_patched_and_no_others(count: int) -> None:
    arena = torch.randint(1 << 30, (3000,), dtype=torch.int32).to(DEVICE)
    # What is behind `count` is left over from another step.
    index = torch.randperm(3000)[: count + 40].to(torch.int32).to(DEVICE)
    index[1:count:4] = -1
    value = torch.randint(-(1 << 30), 0, (count + 40,), dtype=torch.int32).to(DEVICE)
    expected = arena.clone()
    naive_scatter_words(expected, index, value, count)
    scatter_words(arena, index, value, count)
    assert torch.equal(arena, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU, ids=str)
@pytest.mark.parametrize("shape", [(1, 1024), (5, 576), (33, 96)] + [(8191, 4096)] * ON_GPU, ids=str)
def test_embedding_copies_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_tokens, width = shape
    weight = torch.randn(300, width, device=DEVICE).to(dtype)
    input_ids = torch.randint(300, (num_tokens + 1,), dtype=torch.int32, device=DEVICE)[1:]
    input_ids[0] = 299
    out = torch.full((num_tokens, width), torch.nan, dtype=dtype, device=DEVICE)
    assert embed(input_ids, weight, out=out) is out
    assert torch.equal(out, naive_embed(input_ids, weight))
    assert torch.equal(embed(input_ids.long(), weight), out)
    assert embed(input_ids[:0], weight).shape == (0, width)


def compile_kernel(name: str, pointers: str, integers: str, constants: dict[str, int]) -> None:
    signature = {**dict.fromkeys(pointers.split(), "*i32"), **dict.fromkeys(integers.split(), "i32")}
    compile_it = compile_overlapping if name == "decodes_kernel" else compile_for_hopper
    sizes = compile_it(f"{MODULE}:{name}", signature, constants, num_warps=4)
    assert sizes["shared"] < 227 << 10


def test_layout_compiles_for_hopper() -> None:
    compile_kernel(
        "chunks_kernel",
        "rows starts query_start_loc sampling_rows lengths token_ids block_table input_ids positions "
        "slot_mapping seq_lens",
        "num_requests num_tokens request_offset token_ids_stride block_table_stride",
        {"BLOCK_SIZE": 16, "BLOCK": 512},
    )
    compile_kernel(
        "decodes_kernel",
        "rows lengths token_ids block_table input_ids positions slot_mapping seq_lens",
        "num_requests token_ids_stride block_table_stride",
        {"BLOCK_SIZE": 16, "BLOCK": 128},
    )
    compile_kernel(
        "group_slots_kernel",
        "rows query_start_loc positions block_tables slot_mappings",
        "num_decodes num_requests num_tokens num_halvings table_stride_group table_stride_row mapping_stride",
        {"BLOCK_SIZE": 16, "BLOCK": 128},
    )


def test_copies_compile_for_hopper() -> None:
    compile_kernel("scatter_words_kernel", "arena index value", "count", {"BLOCK": 512})
    sizes = compile_overlapping(
        f"{MODULE}:embed_kernel",
        {"input_ids": "*i32", "weight": "*bf16", "out": "*bf16", "weight_stride": "i32", "out_stride": "i32"},
        {"N": 4096, "BLOCK": 4096},
        num_warps=8,
    )
    assert sizes["shared"] < 227 << 10
