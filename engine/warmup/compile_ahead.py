"""Compiles all that a worker will launch beside its start, on every core, into Triton's cache on disk.

One kernel after the other, as each is first launched, would take a core half a minute. Here a child process
finds out what will be launched (kernel_list.py) and has children of its own compile it at once, while the
worker reads weights. All are forked, so that none imports torch again, and die with their parents. What they
fail to compile the worker compiles itself when it comes to it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.runtime.cache import triton_key

from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget
from engine.models.config import ModelConfig

if TYPE_CHECKING:
    from engine.warmup.kernel_list import KernelVariant

logger = logging.getLogger(__name__)

# Seconds; the slowest kernel takes five on one core.
_PATIENCE = 300.0
_MAX_PROCESSES = 24
_PR_SET_PDEATHSIG = 1
# What else of a worker's configuration says which kernels it launches.
_SETTINGS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_blocks",
    "deterministic",
    "speculation",
)


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel, in the cache now.

    Attributes:
        name: Triton's.
        seconds: what compiling it took; next to none if it was there.
        error: why it could not be compiled; empty if it was.
    """

    name: str
    seconds: float
    error: str = ""


class AheadCompiler:
    """Fills a cache directory, which is Triton's of this process (TRITON_CACHE_DIR).

    A stamp for each configuration tells that all of its kernels are there; then nothing is started.

    Args:
        launchable: whether this machine has such a GPU; without its driver only kernels are compiled, and not
            what launches them.
    """

    def __init__(self, directory: Path, target: GpuTarget, *, launchable: bool = True) -> None:
        self.directory = directory
        self._target = target
        self._launchable = launchable

    def start(self, config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> Callable[[], None]:
        """Starts compiling in a child process, if need be; returns what waits until it is done.

        No other thread may run Python code that holds locks meanwhile: the process forks.
        """
        triton.knobs.compilation.listener = _note_compilation
        if self.is_complete(config, model, dtype):
            logger.info("kernels are in %s", self.directory)
            return _nothing_to_wait_for
        logger.info("compiling kernels for %s into %s", self._target, self.directory)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # That there are threads: they wait for ever, and hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(self._in_child(parent, config, model, dtype))
        return functools.partial(_wait_for, child)

    def is_complete(self, config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether there is nothing left to compile for such a worker."""
        return self._stamp(config, model, dtype).exists()

    def compile(self, config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> list[CompiledKernel]:
        """Compiles in child processes what this one finds. Afterwards this process can launch nothing."""
        from engine.warmup.kernel_list import find_kernels

        triton.knobs.compilation.listener = None
        triton_key()  # once, not in every child
        _compile_only(self._target)
        compiling: list[Future[CompiledKernel]] = []
        processes = min(max(2, len(os.sched_getaffinity(0)) - 1), _MAX_PROCESSES)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, fork, _begin_child, (os.getpid(),)) as pool:
            # The first task has all children forked, before Triton is told to compile nothing here.
            support = pool.submit(_build_launch_support if self._launchable else _nothing_to_wait_for)

            def compile_soon(variant: KernelVariant) -> None:
                compiling.append(pool.submit(_compile, variant, launchable=self._launchable))

            find_kernels(config, model, dtype, self._target, compile_soon)
            compiled = [future.result() for future in compiling]
            support.result()
        if not any(kernel.error for kernel in compiled):
            stamp = self._stamp(config, model, dtype)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps([asdict(kernel) for kernel in compiled]))
        return compiled

    def _in_child(self, parent: int, config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        try:
            _die_with_parent(parent)
            started = time.monotonic()
            compiled = self.compile(config, model, dtype)
            logger.info(
                "compiled %d kernels in %.1f s, %.1f s of one core",
                len(compiled),
                time.monotonic() - started,
                sum(kernel.seconds for kernel in compiled),
            )
            for kernel in compiled:
                if kernel.error:
                    logger.warning("%s could not be compiled ahead: %s", kernel.name, kernel.error)
        except BaseException:
            logger.exception("cannot compile ahead")
            return 1
        return 0

    def _stamp(self, config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> Path:
        settings = {name: getattr(config, name) for name in _SETTINGS}
        compiler = (triton.__version__, self._target, self._launchable)
        identity = (_source_digest(), *compiler, settings, model, dtype)
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
        return self.directory / "complete" / f"{digest}.json"


def use_kernel_cache(home: Path, target: GpuTarget) -> Path:
    """Has this process keep compiled kernels in $TRITON_CACHE_DIR, or else in a directory of our own for this
    architecture, Triton and Python; returns which. Called at a process's edge.

    Args:
        home: of pagewire's caches.

    Raises:
        OSError: it cannot be made.
    """
    ours = home / "triton" / f"{target}-triton-{triton.__version__}-{sys.implementation.cache_tag}"
    directory = Path(os.environ.get("TRITON_CACHE_DIR") or ours)
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(directory)
    return directory


def _note_compilation(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
    """Says what was not compiled ahead, though it should have been."""
    if not cache_hit:
        logger.info("compiled %s when it was launched, in %.1f s", src.name, times.total / 1e6)


def _nothing_to_wait_for() -> None:
    pass


def _wait_for(child: int) -> None:
    """Waits for the child to end; says so if it failed, and ends it if it takes for ever."""
    pidfd = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([pidfd], [], [], _PATIENCE)
    finally:
        os.close(pidfd)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != 0:
        logger.warning("kernels could not be compiled ahead; each is compiled when it is first launched")


@functools.cache
def _source_digest() -> str:
    """Of all code that decides what is launched."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _die_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent is gone, and a terminal's Ctrl-C is not for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _compile_only(target: GpuTarget) -> None:
    """From now on Triton, in this process and its children, compiles for the target and launches nothing."""
    from triton.runtime.driver import driver

    from engine.warmup.kernel_list import CompileOnlyDriver

    driver.set_active(CompileOnlyDriver(target))


def _begin_child(parent: int) -> None:
    _die_with_parent(parent)
    torch.set_num_threads(1)


def _compile(variant: KernelVariant, *, launchable: bool) -> CompiledKernel:
    started = time.monotonic()
    error = ""
    try:
        function = getattr(import_module(variant.module), variant.name)
        kernel = function.preload(variant.specialization)
        driver = _cuda_driver()
        # Up to Triton 3.6 at least, every signature has a launcher of its own, written in C.
        if launchable and hasattr(driver, "make_launcher"):
            driver.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as reason:
        error = _root_of(reason)
    return CompiledKernel(variant.name, time.monotonic() - started, error)


def _root_of(error: BaseException) -> str:
    """What Triton says last of a chain of errors, the inner of which name the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _build_launch_support() -> None:
    """Triton's own C extension, which it compiles too."""
    _cuda_driver().CudaUtils()


def _cuda_driver() -> ModuleType:
    from triton.backends.nvidia import driver

    module: ModuleType = driver
    return module
