"""The memory-bound kernels: device time, share of the copy bandwidth, and the same in plain torch.

Launches are captured in a CUDA graph, as decode steps are, and rotate among sets of inputs that together are
larger than the L2 cache where a launch moves 4 MB or more. Smaller ones find their inputs in the cache, as
they do in a model, where the kernel before has just written them: their share of the copy bandwidth says
little, and "empty_launch_us" is their floor. "host_us" is what a launcher costs Python without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.kernels.timing import Call, Timer
from engine.kernels.activate_and_mul.kernel import activate_and_mul
from engine.kernels.rms_norm.kernel import add_rms_norm, rms_norm
from engine.kernels.rms_norm.naive import naive_add_rms_norm, naive_rms_norm
from engine.kernels.rotate_and_store.kernel import rotate_and_store
from engine.kernels.step_inputs.kernel import embed, prepare_chunks, prepare_decodes, scatter_words

TOKENS = (1, 16, 256, 8192)
DTYPE, ITEM = torch.bfloat16, 2
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, NUM_ROWS = 16, 4096, 8192, 256
EPS = 1e-5
ROTATING_BYTES, MAX_SETS = 256 << 20, 64
TIMER = Timer(warm_up=3, replays=15, host_calls=300)


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes that these kernels see."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    vocab: int
    norms_heads: bool
    head_dim: int = 128


MODELS = {
    "llama8b": Model(4096, 32, 8, 14336, 128_256, False),
    "qwen06b": Model(1024, 16, 8, 3072, 151_936, True),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel at one size.

    Attributes:
        moved: the fewest bytes that a launch reads and writes.
        inputs: makes a set of random inputs, and of it the launch and the same in plain torch.
    """

    moved: int
    inputs: Callable[[], tuple[Call, Call]]


def random(*shape: int) -> torch.Tensor:
    """Normal values in the benchmark's dtype."""
    return torch.randn(shape, dtype=DTYPE)


def norm(model: Model, tokens: int) -> Operation:
    """RMSNorm alone."""
    weight = random(model.hidden)

    def inputs() -> tuple[Call, Call]:
        x = random(tokens, model.hidden)
        out = torch.empty_like(x)
        return lambda: rms_norm(x, weight, EPS, out=out), lambda: naive_rms_norm(x, weight, EPS)

    return Operation((2 * tokens + 1) * model.hidden * ITEM, inputs)


def add_norm(model: Model, tokens: int) -> Operation:
    """The residual addition and RMSNorm."""
    weight = random(model.hidden)

    def inputs() -> tuple[Call, Call]:
        x, residual = random(tokens, model.hidden), random(tokens, model.hidden)
        out = torch.empty_like(x)
        return (
            lambda: add_rms_norm(x, residual, weight, EPS, out=out),
            lambda: naive_add_rms_norm(x, residual, weight, EPS),
        )

    return Operation((4 * tokens + 1) * model.hidden * ITEM, inputs)


def activation(model: Model, tokens: int) -> Operation:
    """SwiGLU's activation."""
    width = model.intermediate

    def inputs() -> tuple[Call, Call]:
        gate_up = random(tokens, 2 * width)
        out = torch.empty(tokens, width, dtype=DTYPE)
        return lambda: activate_and_mul(
            gate_up, "silu", out=out
        ), lambda: F.silu(gate_up[:, :width]) * gate_up[:, width:]

    return Operation(3 * tokens * width * ITEM, inputs)


def embedding(model: Model, tokens: int) -> Operation:
    """Rows of the embedding."""
    weight = random(model.vocab, model.hidden)

    def inputs() -> tuple[Call, Call]:
        input_ids = torch.randint(model.vocab, (tokens,), dtype=torch.int32)
        out = torch.empty(tokens, model.hidden, dtype=DTYPE)
        return lambda: embed(input_ids, weight, out=out), lambda: F.embedding(input_ids, weight)

    return Operation(2 * tokens * model.hidden * ITEM, inputs)


def rotation(model: Model, tokens: int) -> Operation:
    """Head norms, rotation and storing."""
    dim, kv_heads = model.head_dim, model.num_kv_heads
    all_heads = model.num_heads + 2 * kv_heads
    sizes = {"num_heads": model.num_heads, "num_kv_heads": kv_heads, "head_dim": dim}
    norms = {name: random(dim) for name in ("q_norm", "k_norm")} if model.norms_heads else {}
    key_cache, value_cache = (torch.zeros(NUM_BLOCKS, BLOCK_SIZE, kv_heads, dim, dtype=DTYPE) for _ in "kv")
    table = torch.rand(MAX_MODEL_LEN, dim)

    def inputs() -> tuple[Call, Call]:
        qkv = random(tokens, all_heads * dim)
        positions, slots = places(tokens)
        angles = table[positions].to(DTYPE)[:, None].chunk(2, dim=-1)
        flat = slots.long()
        caches = key_cache, value_cache
        return (
            lambda: rotate_and_store(qkv, positions, table, *caches, slots, **sizes, **norms, eps=EPS),
            lambda: plain_rotation(model, qkv, angles, caches, flat, **norms),
        )

    return Operation(tokens * (2 * all_heads * dim * ITEM + 4 * dim), inputs)


def places(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """positions and slot_mapping, [T] int32: one token each of many requests, or whole blocks."""
    if tokens <= NUM_ROWS:
        positions = torch.randint(MAX_MODEL_LEN, (tokens,))
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:tokens]
    else:
        positions = torch.arange(tokens) % MAX_MODEL_LEN
        blocks = torch.randperm(NUM_BLOCKS)[: -(-tokens // BLOCK_SIZE), None]
        slots = (blocks * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:tokens]
    return positions.to(torch.int32), slots.to(torch.int32)


def plain_rotation(
    model: Model,
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """What model code without a kernel does; the angles, once a step for all layers, are not counted."""
    kv_heads, dim = model.num_kv_heads, model.head_dim
    query, key, value = qkv.view(len(qkv), -1, dim).split((model.num_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        query, key = naive_rms_norm(query, q_norm, EPS), naive_rms_norm(key, k_norm, EPS)
    cos, sin = angles

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    key_cache, value_cache = (cache.view(-1, kv_heads, dim) for cache in caches)
    key_cache[slots] = rotate(key)
    value_cache[slots] = value
    return rotate(query)


def persistent_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids and block_table."""
    token_ids = torch.randint(1000, (NUM_ROWS, MAX_MODEL_LEN), dtype=torch.int32)
    return token_ids, torch.randint(NUM_BLOCKS, (NUM_ROWS, MAX_MODEL_LEN // BLOCK_SIZE), dtype=torch.int32)


def step_outputs(tokens: int, requests: int) -> dict[str, torch.Tensor]:
    """The arrays that a step writes."""
    names = ("input_ids", "positions", "slot_mapping")
    outputs = {name: torch.empty(tokens, dtype=torch.int32) for name in names}
    return outputs | {"seq_lens": torch.empty(requests, dtype=torch.int32)}


def plain_layout(
    rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, block_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and slots of tokens by their rows and positions, int64; without regard for padding."""
    block_ids = block_table[rows, positions // BLOCK_SIZE]
    return token_ids[rows, positions], block_ids * BLOCK_SIZE + positions % BLOCK_SIZE


def decodes(requests: int) -> Operation:
    """The inputs of requests with one token each."""
    token_ids, block_table = persistent_rows()

    def inputs() -> tuple[Call, Call]:
        rows = torch.randperm(NUM_ROWS)[:requests].to(torch.int32)
        # Far from the end, since every launch makes the rows one token longer.
        lengths = torch.randint(1, MAX_MODEL_LEN // 2, (NUM_ROWS,), dtype=torch.int32)
        outputs = step_outputs(requests, requests)
        wide_rows, wide_starts = rows.long(), lengths[rows.long()].long() - 1
        return (
            lambda: prepare_decodes(rows, lengths, token_ids, block_table, block_size=BLOCK_SIZE, **outputs),
            lambda: (*plain_layout(wide_rows, wide_starts, token_ids, block_table), wide_starts + 1),
        )

    return Operation(8 * 4 * requests, inputs)


def chunks(tokens: int) -> Operation:
    """The inputs of chunks of at most 1,024 tokens."""
    token_ids, block_table = persistent_rows()
    requests = -(-tokens // 1024)
    query_start_loc = torch.tensor([min(1024 * i, tokens) for i in range(requests + 1)], dtype=torch.int32)
    token = torch.arange(tokens)

    def plain(rows: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        request = torch.searchsorted(query_start_loc[1:], token, right=True)
        positions = starts[request] + token - query_start_loc[request]
        seq_lens = starts + query_start_loc[1:] - query_start_loc[:-1]
        return *plain_layout(rows[request], positions, token_ids, block_table), positions, seq_lens

    def inputs() -> tuple[Call, Call]:
        rows = torch.randperm(NUM_ROWS)[:requests].to(torch.int32)
        starts = torch.randint(MAX_MODEL_LEN - 1024, (requests,), dtype=torch.int32)
        outputs = step_outputs(tokens, requests)
        sizes = {"block_size": BLOCK_SIZE, "num_tokens": tokens, "max_count": min(tokens, 1024)}
        wide_rows, wide_starts = rows.long(), starts.long()
        nobody, lengths = torch.full_like(rows, -1), torch.zeros(NUM_ROWS, dtype=torch.int32)
        return (
            lambda: prepare_chunks(
                *(rows, starts, query_start_loc, nobody, lengths, token_ids, block_table), **sizes, **outputs
            ),
            lambda: plain(wide_rows, wide_starts),
        )

    return Operation(4 * 4 * tokens, inputs)


def scattering(words: int) -> Operation:
    """A step's diff."""
    arena = torch.zeros(NUM_ROWS * MAX_MODEL_LEN, dtype=torch.int32)

    def inputs() -> tuple[Call, Call]:
        index = torch.randperm(len(arena))[:words]
        value = torch.randint(1000, (words,), dtype=torch.int32)
        narrow = index.to(torch.int32)
        return lambda: scatter_words(arena, narrow, value, words), lambda: arena.index_copy_(0, index, value)

    return Operation(3 * 4 * words, inputs)


def operations() -> Iterator[tuple[str, Callable[[], Operation]]]:
    """All of them; each is to be made when it is its turn, on the device that is then the default."""
    of_a_model: dict[str, Callable[[Model, int], Operation]] = {
        "rms_norm": norm,
        "add_rms_norm": add_norm,
        "activate_and_mul": activation,
        "rotate_and_store": rotation,
        "embed": embedding,
    }
    of_a_step: dict[str, Callable[[int], Operation]] = {
        "prepare_decodes": decodes,
        "prepare_chunks": chunks,
        "scatter_words": scattering,
    }
    for label, model in MODELS.items():
        for name, make in of_a_model.items():
            yield from ((f"{label} {name} T={tokens}", partial(make, model, tokens)) for tokens in TOKENS)
    for name, make_step in of_a_step.items():
        yield from ((f"{name} T={tokens}", partial(make_step, tokens)) for tokens in TOKENS)


def measure(make: Callable[[], Operation], copy_bandwidth: float) -> dict[str, float]:
    """Ours beside plain torch; copy_bandwidth in bytes a second."""
    with torch.device("cuda"):
        operation = make()
        num_sets = min(max(-(-ROTATING_BYTES // operation.moved), 1), MAX_SETS)
        sets = [operation.inputs() for _ in range(num_sets)]
    ours, plain = ([pair[side] for pair in sets] for side in (0, 1))
    us = TIMER.device_us(ours)
    return {
        "us": round(us, 2),
        "copy_share": round(operation.moved / us * 1e6 / copy_bandwidth, 3),
        "torch_us": round(TIMER.device_us(plain), 2),
        "host_us": round(TIMER.host_us(ours[0]), 1),
    }


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    copy_bandwidth = TIMER.copy_bandwidth()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_per_s": round(copy_bandwidth / 1e9),
        "empty_launch_us": round(TIMER.empty_launch_us(MAX_SETS), 2),
    }
    for name, make in operations():
        results[name] = measure(make, copy_bandwidth)
        torch.cuda.empty_cache()
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
