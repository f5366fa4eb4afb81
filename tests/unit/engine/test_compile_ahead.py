"""Compiling a worker's kernels beside its start: what is compiled, and what happens when that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget, find_gpu
from engine.cuda.head_start import HeadStart
from engine.cuda.quantized_products import cuda_layout_products
from engine.layers.linear import RowParallelLinear
from engine.layers.linear_method import SameMethod
from engine.layers.parallel import TensorParallel
from engine.models.config import ModelConfig
from engine.models.families import load_model_config
from engine.quant.methods.choose import METHODS
from engine.warmup import compile_ahead
from engine.warmup.compile_ahead import AheadCompiler, CompiledKernel
from engine.warmup.kernel_list import KernelVariant
from engine.warmup.quantized import empty_layout
from tests.unit.engine.quantized_checkpoints import compressed
from tests.unit.engine.test_quantized_layers import MIXTRAL, SPLIT, Stored, load
from tests.unit.engine.test_quantized_models import CHANNEL_8, NF4, TOKENS_8
from tests.unit.engine.tiny_experts import write_gpt_oss
from tests.unit.engine.tiny_model import CONFIG

TARGET = GpuTarget(90, 132)
WORKER = WorkerConfig(model="unused", socket=Path("unused"), max_num_seqs=16, max_num_batched_tokens=256)

# Notes the names under which Triton would store what it compiles: of what is compiled ahead, and of what the
# same code launches. Runs alone, without Triton's interpreter, which this process may have chosen.
NAMES = """
import json, sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
import torch
import triton.compiler
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.driver import driver
from triton._C.libtriton import get_cache_invalidating_env_vars
from engine.warmup import kernel_list
from engine.cuda.gpu import GpuTarget
from engine.models.families import load_model_config
from tests.unit.engine.test_compile_ahead import WORKER

names = set()

def compile(src, target, options, **_):
    backend = make_backend(target)
    key = get_cache_key(src, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    names.add(f"{src.name} {key}")

triton.compiler.compile = compile
target = GpuTarget(90, 132)
driver.set_active(kernel_list.CompileOnlyDriver(target))
arguments = (WORKER, load_model_config(Path(sys.argv[1])), torch.bfloat16, target)
variants = []
kernel_list.find_kernels(*arguments, variants.append)
assert not names
for variant in variants:
    getattr(import_module(variant.module), variant.name).preload(variant.specialization)
ahead, names = names, set()
kernel_list._noted_launches = lambda _: nullcontext()  # now every launch is compiled
kernel_list.find_kernels(*arguments, None)
print(json.dumps([sorted(ahead), sorted(names)]))
"""


# How many variants of each kernel are found for a model whose last layers are unlike the others. As many as
# the first four would be one KV group.
KINDS = """
import json, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch
from triton.runtime.driver import driver
from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget
from engine.models.config import LayerConfig
from engine.models.families import load_model_config
from engine.warmup import kernel_list

target = GpuTarget(90, 132)
driver.set_active(kernel_list.CompileOnlyDriver(target))
model = load_model_config(Path(sys.argv[1]))
windowed = LayerConfig(rotary=None, sliding_window=230)
model = replace(model, layers=(model.layers[0],) * 3 + (windowed,) * 3)
worker = WorkerConfig(model="unused", socket=Path("unused"), max_num_seqs=2, max_num_batched_tokens=32)
found = []
kernel_list.find_kernels(worker, model, torch.bfloat16, target, found.append)
print(json.dumps(Counter(variant.name for variant in found)))
"""


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return load_model_config(tmp_path)


def run_alone(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.getcwd()},
        check=False,
    )


def test_what_is_compiled_ahead_is_what_will_be_launched(tmp_path: Path, model: ModelConfig) -> None:
    run = run_alone(NAMES, tmp_path)
    assert run.returncode == 0, run.stderr
    ahead, launched = json.loads(run.stdout.splitlines()[-1])
    assert ahead == launched
    functions = {name.split()[0] for name in ahead}
    assert functions >= {"_decode_kernel", "_prefill_kernel", "_choose_tokens", "scatter_words_kernel"}


@pytest.mark.slow
def test_kernels_of_experts_are_found_too(tmp_path: Path) -> None:
    # So many that one token takes rows, and a longer step tiles.
    write_gpt_oss(tmp_path / "mxfp4", tmp_path / "plain", num_experts=16)
    run = run_alone(NAMES, tmp_path / "mxfp4")
    assert run.returncode == 0, run.stderr
    ahead, launched = json.loads(run.stdout.splitlines()[-1])
    assert ahead == launched
    functions = {name.split()[0] for name in ahead}
    assert functions >= {"route_kernel", "count_kernel", "place_kernel", "combine_kernel"}
    assert functions >= {"gate_up_rows_kernel", "down_rows_kernel"}
    assert functions >= {"gate_up_tiles_kernel", "down_tiles_kernel"}


QUANTIZED = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"shared_words_kernel", "dequantize_kernel"},
    ),
    "w8a8": (
        compressed("int-quantized", CHANNEL_8, TOKENS_8),
        {"quantize_kernel", "int8_kernel"},
    ),
    "gptq experts": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"expert_words_kernel", "gate_kernel", "combine_kernel", "shared_words_kernel"},
    ),
    "nf4": (NF4, {"shared_words_kernel", "dequantize_kernel"}),
}


@pytest.mark.parametrize("name", SPLIT)
def test_layers_of_a_rehearsal_have_the_shapes_of_those_that_are_loaded(name: str) -> None:
    scheme, quantize = SPLIT[name]
    products = cuda_layout_products(torch.device("cpu"), deterministic=False)
    stored, _ = quantize(torch.randn(96, 128))
    methods = SameMethod(METHODS[type(scheme)](scheme, products, Stored(stored)))
    layer = RowParallelLinear("down", 128, 96, bias=False, methods=methods, parallel=TensorParallel())
    [loaded] = load(layer, {"": stored})
    rehearsed = empty_layout(scheme, 96, 128)
    assert type(rehearsed) is type(loaded)
    for field in dataclasses.fields(loaded):
        ours, theirs = getattr(rehearsed, field.name), getattr(loaded, field.name)
        if isinstance(theirs, torch.Tensor):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field.name
        elif field.name != "outliers":  # their kernel is compiled whether a checkpoint has some or not
            assert ours == theirs, field.name


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_kernels_of_quantized_layers_are_found_without_their_weights(name: str, tmp_path: Path) -> None:
    described, functions = QUANTIZED[name]
    config = {**CONFIG, **(MIXTRAL if "experts" in name else {}), "quantization_config": described}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = run_alone(NAMES, tmp_path)
    assert run.returncode == 0, run.stderr
    ahead, launched = json.loads(run.stdout.splitlines()[-1])
    assert ahead == launched
    assert {each.split()[0] for each in ahead} >= functions


@pytest.mark.slow  # test_what_is_compiled_ahead_is_what_will_be_launched says it of one kind
def test_kernels_of_a_kind_of_layer_that_comes_late_are_found_too(tmp_path: Path, model: ModelConfig) -> None:
    run = run_alone(KINDS, tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rotate_and_store_kernel"] == 2, "with angles and without"
    assert found["group_slots_kernel"] == 1, "the layers with a window are a KV group"


def compile_nothing(self: AheadCompiler, *arguments: object) -> list[CompiledKernel]:
    stamp = self._stamp(*arguments)
    stamp.parent.mkdir()
    stamp.write_text("")
    return []


def test_a_full_cache_starts_nothing(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AheadCompiler, "compile", compile_nothing)
    compiler = AheadCompiler(tmp_path / "cache", TARGET)
    compiler.directory.mkdir()
    compiler.start(WORKER, model, torch.bfloat16)()

    def refuse() -> int:
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "fork", refuse)
    compiler.start(WORKER, model, torch.bfloat16)()
    for other in (
        lambda: compiler.start(WORKER, model, torch.float16),
        lambda: AheadCompiler(compiler.directory, GpuTarget(80, 108)).start(WORKER, model, torch.bfloat16),
        lambda: compiler.start(WorkerConfig(model="", socket=Path(), max_num_seqs=17), model, torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="a process was started"):
            other()


def test_a_failure_is_told_and_leaves_the_cache_unfinished(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> list[CompiledKernel]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(AheadCompiler, "compile", fail)
    AheadCompiler(tmp_path, TARGET).start(WORKER, model, torch.bfloat16)()
    assert "could not be compiled ahead" in caplog.text
    assert not (tmp_path / "complete").exists()


class Kernel:
    """Stands in for Triton's."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def preload(self, specialization: str) -> object:
        if self.error is not None:
            raise ValueError("in line 3") from self.error
        return object()


odd_kernel = Kernel(AssertionError("shapes\nK must be at least 16"))
even_kernel = Kernel()


def test_a_kernel_that_cannot_be_compiled_is_named_and_keeps_no_other_from_it(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["odd_kernel", "even_kernel"]

    def find(*arguments: Any) -> None:
        for name in names:
            arguments[-1](KernelVariant(__name__, name, ""))

    monkeypatch.setattr("engine.warmup.kernel_list.find_kernels", find)
    monkeypatch.setattr(compile_ahead, "_compile_only", lambda _: None)
    compiler = AheadCompiler(tmp_path / "cache", TARGET, launchable=False)
    odd, even = compiler.compile(WORKER, model, torch.bfloat16)
    assert (odd.name, odd.error) == ("odd_kernel", "K must be at least 16")
    assert (even.name, even.error) == ("even_kernel", "")
    assert not compiler.is_complete(WORKER, model, torch.bfloat16)
    names.pop(0)
    compiler.compile(WORKER, model, torch.bfloat16)
    assert compiler.is_complete(WORKER, model, torch.bfloat16)


def test_a_compiler_that_hangs_is_killed(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(AheadCompiler, "compile", lambda *_: time.sleep(600))
    monkeypatch.setattr(compile_ahead, "_PATIENCE", 0.2)
    before = set(psutil.Process().children())
    AheadCompiler(tmp_path, TARGET).start(WORKER, model, torch.bfloat16)()
    assert "could not be compiled ahead" in caplog.text
    assert set(psutil.Process().children()) <= before


# A worker whose compilers take for ever; prints when they have begun.
STUCK = """
import sys, time
from pathlib import Path
import torch
from engine.warmup import compile_ahead, kernel_list
from engine.models.families import load_model_config
from tests.unit.engine.test_compile_ahead import TARGET, WORKER

class Stuck:
    def preload(self, specialization):
        print("compiling", flush=True)
        time.sleep(600)

stuck = Stuck()

def find_kernels(*arguments):
    for _ in range(2):
        arguments[-1](kernel_list.KernelVariant("__main__", "stuck", ""))

kernel_list.find_kernels = find_kernels
compiler = compile_ahead.AheadCompiler(Path(sys.argv[1]), TARGET, launchable=False)
compiler.start(WORKER, load_model_config(Path(sys.argv[1])), torch.bfloat16)()
"""


def test_no_process_survives_a_killed_worker(tmp_path: Path, model: ModelConfig) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.read(9) == "compiling"
    family = psutil.Process(worker.pid).children(recursive=True)
    assert len(family) >= 2
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    worker.stdout.close()


def test_a_machine_without_cuda_has_no_gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert find_gpu(0) is None
    assert HeadStart("auto").wait() is None
    assert HeadStart("cpu").wait() is None
