"""The pool of threads: what several compute is what one computes, whatever the sizes of the jobs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from engine.cpu.kernels.blocks import BLOCK_KINDS
from engine.cpu.kernels.library import NativeLibrary
from tests.unit.engine.cpu_kernels.test_products import random_rows


def outputs(path: Path, num_threads: int, seed: int) -> list[torch.Tensor]:
    """Of jobs of many sizes, one after the other."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    native = NativeLibrary(path, num_threads)
    found = []
    for _ in range(60):
        kind = BLOCK_KINDS[str(rng.choice(["Q4_1", "Q8_0", "Q6_K"]))]
        rows, columns, num_tokens = (
            int(rng.integers(1, 400)),
            int(rng.integers(1, 3)) * 256,
            int(rng.integers(1, 40)),
        )
        matrix = native.pack(kind, random_rows(kind, rows, columns, seed)[0], columns)
        generator = torch.Generator().manual_seed(seed)
        found.append(native.multiply(torch.randn(num_tokens, columns, generator=generator), matrix))
        found.append(native.rms_norm(found[-1], torch.ones(rows), 1e-5))
        found.append(native.embed(torch.arange(rows), matrix))
    native.close()
    return found


def test_pools_side_by_side_compute_what_one_thread_computes(library_path: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        seeds, threads = range(4), (2, 3, 5, 8)
        several = list(executor.map(outputs, [library_path] * 4, threads, seeds))
    for seed, found in zip(seeds, several, strict=True):
        assert all(map(torch.equal, found, outputs(library_path, 1, seed)))


def test_a_pool_without_work_uses_no_processor_time(library_path: Path) -> None:
    native = NativeLibrary(library_path, 4)
    native.rms_norm(torch.randn(100, 1000), torch.ones(1000), 1e-5)
    time.sleep(0.05)  # it watches for work for a while
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    native.close()
