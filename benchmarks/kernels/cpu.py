"""Products of the native CPU kernels by instruction set, number format and tokens, one thread each.

Every product reads another copy of its matrix, as layers of a model do: weights come from memory. GB/s
are of packed weights; beside them what a copy of 64 MB reads and writes on the same machine.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from benchmarks import record
from engine.cpu.kernels.blocks import BLOCK_KINDS, BlockKind
from engine.cpu.kernels.build import DIRECTORY, build
from engine.cpu.kernels.library import NativeLibrary, PackedMatrix, UnknownInstructionsError
from pagewire.base.cache_home import cache_home

INSTRUCTIONS = ("avx512", "avxvnni", "avx2", "plain")
KINDS = ("Q4_1", "Q8_0", "Q4_K", "BF16")
SHAPES = ((3072, 576), (49152, 576), (8192, 2048))
TOKENS = (1, 4, 16, 256)
# Of copies of a matrix: more than caches hold.
COPIED_BYTES = 192 << 20
SECONDS = 0.1
COPY_BYTES = 64 << 20


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    path = build(cache_home() / DIRECTORY)
    results: dict[str, Any] = {"copy of 64 MB, GB/s read and written": _copy_rate()}
    for instructions in INSTRUCTIONS:
        try:
            library = NativeLibrary(path, 1, instructions)
        except UnknownInstructionsError:
            continue
        results[instructions] = {
            f"{name} {rows}x{columns}": _measure(library, BLOCK_KINDS[name], rows, columns)
            for name, (rows, columns) in itertools.product(KINDS, SHAPES)
            if columns % BLOCK_KINDS[name].columns == 0
        }
        library.close()
    record.write(arguments.json, results)


def _copy_rate() -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return round(2 * COPY_BYTES / _seconds(lambda: target.copy_(source)) / 1e9, 1)


def _measure(library: NativeLibrary, kind: BlockKind, rows: int, columns: int) -> dict[str, Any]:
    """GB/s of weights for one token, and GFLOP/s for each number of tokens."""
    # Any bytes are a matrix; zeros take as long as others.
    packed = library.pack(kind, torch.zeros(rows, kind.row_bytes(columns), dtype=torch.uint8), columns)
    count = max(1, COPIED_BYTES // packed.panels.numel())
    copies = [PackedMatrix(kind, rows, columns, packed.panels.clone()) for _ in range(count)]
    turn = itertools.cycle(copies)
    told: dict[str, Any] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, columns)
        seconds = _seconds(lambda x=x: library.multiply(x, next(turn)))
        if tokens == 1:
            told["GB/s"] = round(packed.panels.numel() / seconds / 1e9, 1)
        told[f"GFLOP/s, {tokens} tokens"] = round(2 * rows * columns * tokens / seconds / 1e9, 1)
    return told


def _seconds(work: Any) -> float:
    """The median of as many calls as fit."""
    work()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


if __name__ == "__main__":
    main()
