"""NVIDIA GPUs: the project's own kernels, CUDA graphs, and a KV pool sized by measured memory use."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping

import torch

from engine.attention.interface import AttentionBackend, HeadLayout
from engine.config import WorkerConfig
from engine.cuda.adapters import CudaLinearAdapters
from engine.cuda.attention import TritonAttentionBackend
from engine.cuda.expert_method import cuda_expert_methods
from engine.cuda.fp8_products import has_fp8
from engine.cuda.graphs import GraphSize, decode_graph_sizes, mixed_graph_sizes
from engine.cuda.linear_method import CudaLinearMethod, InvariantMethod
from engine.cuda.ops import TritonLayerOps
from engine.cuda.peer_sums import PeerSums, can_exchange
from engine.cuda.quantized_products import cuda_layout_products
from engine.cuda.rows import DeviceRows
from engine.cuda.runner import CudaModelRunner
from engine.cuda.step_cost import step_cost
from engine.dispatch.limits import EngineLimits
from engine.layers.adapters import LayerSlots, LinearAdapters
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import LinearMethods, SameMethod
from engine.layers.ops import LayerOps
from engine.models.base import CausalLM
from engine.parallel.communicator import Communicator
from engine.parallel.exchange import PeerExchange
from engine.platform.base import MakeTrial, Platform
from engine.platform.device import CUDA_DEFAULTS, fitting, pick_kv_dtype
from engine.platform.kv_cache import GIB, KVPool
from engine.quant.products import LayoutProducts
from engine.step.pipeline import make_stage
from engine.step.runner import Runner
from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)

# Left free in addition to the measured memory: allocators round up, and libraries allocate more over time.
SLACK_BYTES = 256 * 1024**2

# What NCCL allocates when ranks meet, which is after the KV pool was sized.
_NCCL_BYTES = 768 * 1024**2

# The smallest batch of decodes for which a graph with a shared prefix is captured.
_FEWEST_SHARING = 8

# The cost of launching a layer without a graph.
_LAUNCHES_PER_LAYER = 10
_LAUNCH_SECONDS = 25e-6


class CudaPlatform(Platform):
    """See the module."""

    defaults = CUDA_DEFAULTS

    def __init__(self, config: WorkerConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._config = config
        if config.kv_cache_dtype != "auto" and not has_fp8(device):
            raise ConfigError(
                f"kv_cache_dtype is {config.kv_cache_dtype!r}, which needs a GPU of compute capability 8.9 "
                "or above; on this one it must be auto"
            )

    def make_current(self) -> None:
        """Makes this GPU the current device. Triton launches on the current device wherever its tensors are,
        and pinned memory, streams and events without an explicit device belong to it.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        return TritonAttentionBackend(
            heads,
            max_num_seqs=max_num_seqs,
            device=self.device,
            dtype=self.dtype,
            cache_dtype=pick_kv_dtype(self._config.kv_cache_dtype, self.dtype),
            deterministic=self._config.deterministic,
        )

    def ops(self) -> LayerOps:
        return TritonLayerOps()

    def met(self, runner: Runner, communicator: Communicator) -> None:
        assert isinstance(runner, CudaModelRunner)
        if not self._config.enforce_eager:
            runner.met(communicator.texts)

    def peers(self, rank: int, size: int) -> PeerExchange | None:
        if not can_exchange(size):
            return None
        try:
            return PeerSums(rank, size, self.device)
        except OSError as error:
            logger.warning("all sums go through NCCL: %s", error)
            return None

    def linear_methods(self) -> LinearMethods:
        deterministic = self._config.deterministic
        return SameMethod(InvariantMethod() if deterministic else CudaLinearMethod(self.device))

    def linear_adapters(self, slots: LayerSlots) -> LinearAdapters:
        return CudaLinearAdapters(slots, invariant=self._config.deterministic)

    def layout_products(self) -> LayoutProducts:
        return cuda_layout_products(self.device, deterministic=self._config.deterministic)

    def expert_methods(self) -> Mapping[str, ExpertMethod]:
        return cuda_expert_methods(self.device, deterministic=self._config.deterministic)

    def make_runner(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_pool: KVPool,
        limits: EngineLimits,
    ) -> Runner:
        assert isinstance(backend, TritonAttentionBackend)
        rows = DeviceRows(limits, self.device)
        stage = make_stage(
            model.parallel.communicator,
            model.stage.index,
            model.stage.count,
            num_rows=limits.max_num_seqs,
            hidden_size=limits.hidden_size,
            max_tokens=limits.max_num_batched_tokens + limits.max_num_seqs,  # with the padding of graphs
            dtype=self.dtype,
            device=self.device,
        )
        return CudaModelRunner(model, backend, kv_pool, rows, self._config.speculation, stage)

    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        """Bytes for the KV pool: what `gpu_memory_utilization` allows, minus the memory in use, the largest
        step and the graphs. The last two are measured once with a small pool."""
        torch.cuda.empty_cache()
        with fitting(self.device, "the largest step"):
            before = torch.cuda.memory_allocated(self.device)
            trial = make_trial()
            assert isinstance(trial, CudaModelRunner)
            step_bytes = self._step_bytes(trial, before)
            graph_bytes = 0 if self._config.enforce_eager else self._graph_bytes(trial)
            del trial
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        taken = total - free
        allowed = int(total * self._config.gpu_memory_utilization)
        library_bytes = _NCCL_BYTES if self._config.world_size > 1 else 0
        left = allowed - taken - step_bytes - graph_bytes - library_bytes - SLACK_BYTES
        account = (
            f"{allowed / GIB:.2f} GiB allowed of {total / GIB:.2f}; {taken / GIB:.2f} taken by weights and "
            f"other programs, {step_bytes / GIB:.2f} by the largest step, {graph_bytes / GIB:.2f} by graphs"
        )
        if left <= 0:
            raise ConfigError(
                f"no GPU memory is left for the KV pool: {account}. Raise gpu_memory_utilization, lower "
                "max_num_batched_tokens or max_num_seqs, or free the GPU"
            )
        logger.info("GPU memory: %s; %.2f left for the KV pool", account, left / GIB)
        return left

    def _step_bytes(self, trial: CudaModelRunner, before: int) -> int:
        """Bytes of the runner's own buffers and of the largest step, beyond what was allocated before."""
        torch.cuda.reset_peak_memory_stats(self.device)
        trial.rehearse(trial.largest_shape)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - before

    def _graph_bytes(self, trial: CudaModelRunner) -> int:
        """Bytes of all graphs: they share the largest one's memory pool, and each has its own nodes."""
        sizes = self._graph_sizes(trial)
        largest = max(sizes, key=lambda size: size.num_tokens)
        torch.cuda.empty_cache()
        free_before, _ = torch.cuda.mem_get_info(self.device)
        reserved_before = torch.cuda.memory_reserved(self.device)
        trial.capture([largest])
        free_after, _ = torch.cuda.mem_get_info(self.device)
        pool = torch.cuda.memory_reserved(self.device) - reserved_before
        nodes = max(0, free_before - free_after - pool)
        return pool + nodes * len(sizes)

    def _graph_sizes(self, runner: CudaModelRunner) -> list[GraphSize]:
        """The sizes worth a graph: all decode steps, and mixed steps that take longer to launch than to
        compute."""
        max_num_seqs = runner.rows.limits.max_num_seqs
        decodes = decode_graph_sizes(max_num_seqs, runner.rows.limits.max_drafts)
        sizes = [GraphSize(size, 0, 0, False) for size in decodes]
        if not self._config.deterministic and runner.rows.can_share_prefix:
            sizes += [GraphSize(size, 0, 0, True) for size in decodes if size >= _FEWEST_SHARING]
        if runner.rows.limits.max_loras:
            sizes += [GraphSize(size, 0, 0, False, True) for size in decodes]
        host_seconds = len(runner.kv_pool.layers) * _LAUNCHES_PER_LAYER * _LAUNCH_SECONDS
        for size in mixed_graph_sizes(max_num_seqs, runner.rows.limits.max_num_batched_tokens):
            if step_cost(runner.model, size.num_tokens).seconds < host_seconds:
                sizes.append(size)
        return sizes

    def finish(self, runner: Runner) -> None:
        assert isinstance(runner, CudaModelRunner)
        runner.rehearse_prompts()
        if self._config.enforce_eager:
            return
        sizes = self._graph_sizes(runner)
        # The largest graph allocates the memory that all share. Plain decodes are needed by every request.
        largest = max(sizes, key=lambda size: size.num_tokens)
        first = [size for size in sizes if size == largest or size.is_plain_decode]
        later = [size for size in sizes if size not in first]
        if self._config.world_size > 1:
            runner.capture_when_met(first, later)
            return
        runner.capture(first)
        runner.capture_later(later)
        logger.info("captured %d of %d graphs; the others follow when there is time", len(first), len(sizes))
