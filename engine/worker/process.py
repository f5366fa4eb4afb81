"""A worker's process, from its configuration to its exit status."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from engine.config import WorkerConfig
from engine.cpu.kernels.build import build_ahead
from engine.cuda.gpu import GpuTarget
from engine.cuda.head_start import HeadStart
from engine.worker.timeline import Timeline
from pagewire.base.errors import ConfigError
from pagewire.base.exit_status import CONFIG_ERROR, DEVICE_LOST
from pagewire.base.lifeline import end_with_parent
from pagewire.telemetry.logs import log_to_stderr

if TYPE_CHECKING:
    from engine.worker.build import CompileAhead

logger = logging.getLogger(__name__)

_NCCL_SETTINGS = {
    # torch's watchdog would end this process, and its weights, when another rank dies.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # NVLink multicast, which NCCL sums by where it can, hangs some hosts' drivers when a process dies.
    "NCCL_NVLS_ENABLE": "0",
}


def run_process(command: Callable[[], None]) -> None:
    """Runs what reads a configuration and runs its worker, and ends the process.

    Status 0: terminated by SIGTERM. 2: the command line, a setting or a model is wrong. 69: the device
    failed.
    """
    tell_stacks()
    end_with_parent()
    try:
        command()
    except ConfigError as error:
        print(f"engine-worker: {error.message}", file=sys.stderr)
        sys.exit(CONFIG_ERROR)


def run_worker(config: WorkerConfig) -> int:
    """Loads a model and computes steps for a scheduler until SIGTERM; the exit status.

    Raises:
        ConfigError: a setting or the model is wrong.
    """
    log_to_stderr(config.log_format, "engine-worker")
    timeline = Timeline()
    timeline.mark("Python")
    serve = _serve_nothing if config.engine == "null" else _serve_model
    return serve(config, timeline)


def _serve_model(config: WorkerConfig, timeline: Timeline) -> int:
    _check_model(config)
    _set_thread_policy(config.world_size)
    head_start = HeadStart(config.device, config.rank)
    build_ahead(config.device, config.dtype)

    from engine.worker.build import build_worker
    from engine.worker.loop import run

    timeline.mark("imports")
    target = head_start.wait()
    if target is not None:
        timeline.mark("CUDA")
    compile_ahead = _compiler(target) if target else None
    status = run(
        config, partial(build_worker, config, compile_ahead=compile_ahead, timeline=timeline), timeline
    )
    if status == DEVICE_LOST:
        # Whatever the interpreter and its libraries would tidy up asks a device that may hang or abort.
        logging.shutdown()
        os._exit(status)
    return status


def _check_model(config: WorkerConfig) -> None:
    """Reads what is wrong with a model most often, before the seconds that torch takes to import."""
    from engine.models.families import load_model_config
    from pagewire.hub import resolve_checkpoint

    directory, _ = resolve_checkpoint(config.model, config.load_format)
    load_model_config(directory, config.quantization)


def _serve_nothing(config: WorkerConfig, timeline: Timeline) -> int:
    """Imports no torch, so that it starts at once."""
    from engine.null.build import build_null_worker
    from engine.worker.loop import run

    timeline.mark("imports")
    return run(config, partial(build_null_worker, config), timeline)


def _compiler(target: GpuTarget) -> CompileAhead | None:
    """What compiles into the cache of kernels; None where that cannot be written."""
    from engine.warmup.compile_ahead import AheadCompiler, use_kernel_cache
    from pagewire.base.cache_home import cache_home

    try:
        directory = use_kernel_cache(cache_home(), target)
    except OSError as error:
        logger.warning("compiled kernels are not kept: %s", error)
        return None
    return AheadCompiler(directory, target).start


def _set_thread_policy(num_ranks: int) -> None:
    """Makes torch's OpenMP threads sleep while they wait. Read when torch is first imported.

    Spinning threads keep a core busy between steps, and on a shared machine they cost more than they save.
    Ranks of one machine share its processors.
    """
    if num_ranks > 1:
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
        for name, value in _NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def tell_stacks() -> None:
    """Has the stacks of all threads written to stderr when the process crashes, and on SIGUSR1, with which
    the scheduler asks where a worker hangs. C code writes them, whatever Python waits for.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
