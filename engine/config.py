"""The engine-worker's configuration, resolved once at the process's edge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.speculation.settings import SpeculationSettings, read_settings
from pagewire.base.observed import check_observed
from pagewire.base.settings import require, require_positive

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Steps of a minute, tokens of a minute: more is a mistake.
LONGEST_NULL = 60_000.0
ENGINES = ("model", "null")
# Readers of one ring of plans.
MAX_WORLD_SIZE = 32
MAX_LORAS = 256
MAX_LORA_RANK = 512
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
# Those that plain weights are turned into as they are loaded, then those that checkpoints have.
QUANTIZATIONS = (
    *("auto", "int8", "int4", "fp8"),
    *("awq", "gptq", "auto-round", "compressed-tensors", "bitsandbytes", "squeezellm", "mxfp4"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What one engine-worker runs. None means: decide from the device and the model.

    Attributes:
        model: a directory in Hugging Face layout, a .gguf file, a model on a hub or an alias.
        socket: path of the Unix control socket it listens on; ranks after the first add their number to it.
        rank: its place among the workers that share the model, from 0; those of one pipeline stage are
            neighbours.
        tensor_parallel_size: workers that share each layer, each with a part of every matrix, on a GPU each.
        pipeline_parallel_size: stages, each with some of the layers; each has tensor_parallel_size workers.
        engine: "model", or "null" to measure everything else: tokens come at a set rate from no model at all.
        device: "auto", "cpu" or "cuda" (optionally "cuda:N").
        dtype: "auto", "float32", "bfloat16" or "float16". On a CPU "auto" computes on weights in the format
            that the file has them in; any other is that of the weights too.
        load_format: "auto", "safetensors", "gguf" or "dummy" (random weights from config.json alone).
        quantization: int8, int4 or fp8 turn plain weights into that as they are loaded. Of quantized ones
            auto reads what the checkpoint says: awq, gptq, auto-round, compressed-tensors, fp8, bitsandbytes,
            squeezellm or mxfp4; naming it insists on it (docs/quantization.md).
        kv_cache_dtype: of keys and values: auto is that of activations; fp8, or fp8_e4m3, takes half of it,
            so that twice as many tokens fit. Needs a GPU. Scales are the checkpoint's, or else 1.
        speculative_config: draft tokens are proposed and verified several at a time, which changes nothing in
            the output: a JSON object with method (ngram), num_speculative_tokens, prompt_lookup_min and
            prompt_lookup_max (docs/speculation.md). Default none.
        speculative_model: short for the model in there; ngram for n-grams of the request itself.
        num_speculative_tokens: short for the number in there; draft tokens of a request in a step, at most.
        max_model_len: the longest request in tokens; default the model's own, cut to what the pool holds.
        max_num_seqs: request rows.
        max_num_batched_tokens: the most tokens computed in a step.
        block_size: tokens per KV block.
        num_blocks: KV blocks; default from the memory limits below. Where only some layers have a sliding
            window, a block serves one of several groups of layers.
        gpu_memory_utilization: share of the GPU's memory that weights, activations and KV pool may take.
        kv_cache_memory: bytes of KV pool on the CPU; default a share of the machine's free memory.
        enable_lora: serve LoRA adapters beside the model (docs/adapters.md).
        max_loras: adapters in use at once, each with memory on the device for max_lora_rank.
        max_lora_rank: the largest rank of an adapter.
        max_cpu_loras: adapters kept in host memory; of more, those least recently used are read again from
            their files when requests come for them.
        enforce_eager: launch every kernel of every step instead of replaying CUDA graphs.
        deterministic: a request's tokens are bitwise the same in any batch; slower. Needs a GPU.
        seed: of dummy weights.
        profile: write a summary of what the GPU did during some steps to this file.
        profile_from: the first step profiled, counted from the process's start.
        profile_steps: how many are.
        null_step_ms: what each step takes with the null engine; 0 is as fast as it can be asked.
        null_prompt_us: what each token of a prompt adds to its step with the null engine, microseconds.
        log_format: how logs are written: text, or json, an object a line with the ids of request and trace.
        otlp_traces_endpoint: where spans of traced requests are sent by OTLP: http://HOST:4317 by gRPC,
            http://HOST:4318/v1/traces by HTTP. Default nowhere; nothing is traced then. Needs pagewire[otel].
    """

    model: str
    socket: Path
    rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    engine: str = "model"
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    speculative_config: str | None = None
    speculative_model: str | None = None
    num_speculative_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory: int | None = None
    enable_lora: bool = False
    max_loras: int = 4
    max_lora_rank: int = 64
    max_cpu_loras: int = 64
    enforce_eager: bool = False
    deterministic: bool = False
    seed: int = 0
    profile: Path | None = None
    profile_from: int = 300
    profile_steps: int = 50
    null_step_ms: float = 0.0
    null_prompt_us: float = 0.0
    log_format: str = "text"
    otlp_traces_endpoint: str | None = None

    @property
    def speculation(self) -> SpeculationSettings | None:
        """How draft tokens are proposed; None if none are."""
        return read_settings(self.speculative_config, self.speculative_model, self.num_speculative_tokens)

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of its range."""
        kind, colon, index = self.device.partition(":")
        require(
            (kind in ("auto", "cpu", "cuda") and not colon) or (kind == "cuda" and index.isdecimal()),
            "device",
            self.device,
            "auto, cpu, cuda or cuda:N",
        )
        check_observed(self)
        require(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(
            self.load_format in LOAD_FORMATS,
            "load_format",
            self.load_format,
            f"one of {', '.join(LOAD_FORMATS)}",
        )
        require(
            self.quantization in QUANTIZATIONS,
            "quantization",
            self.quantization,
            f"one of {', '.join(QUANTIZATIONS)}",
        )
        require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            "kv_cache_dtype",
            self.kv_cache_dtype,
            f"one of {', '.join(KV_CACHE_DTYPES)}",
        )
        self._check_ranks()
        speculation = self.speculation
        require(
            speculation is None or self.engine == "model",
            "speculative_config",
            self.speculative_config,
            "absent with the null engine",
        )
        require_positive(
            self,
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_blocks",
            "kv_cache_memory",
            "profile_from",
            "profile_steps",
            "max_loras",
            "max_lora_rank",
            "max_cpu_loras",
        )
        most = MAX_LORA_RANK
        require(self.max_lora_rank <= most, "max_lora_rank", self.max_lora_rank, f"at most {most}")
        require(self.max_loras <= MAX_LORAS, "max_loras", self.max_loras, f"at most {MAX_LORAS}")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "greater than 0 and at most 1",
        )
        for name in ("null_step_ms", "null_prompt_us"):
            value = getattr(self, name)
            require(0 <= value <= LONGEST_NULL, name, value, f"at least 0 and at most {LONGEST_NULL:g}")
            require(self.engine == "null" or value == 0, name, value, "0 unless the engine is null")

    @property
    def world_size(self) -> int:
        """How many workers share the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _check_ranks(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(self, name)
            require(1 <= size <= MAX_WORLD_SIZE, name, size, f"1 to {MAX_WORLD_SIZE}")
            require(self.engine == "model" or size == 1, name, size, "1 with the null engine")
        require(
            self.pipeline_parallel_size == 1 or self.speculation is None,
            "pipeline_parallel_size",
            self.pipeline_parallel_size,
            "1 with draft tokens: the first stage does not know how many the last one accepts",
        )
        size = self.world_size
        require(
            size <= MAX_WORLD_SIZE,
            "tensor_parallel_size",
            self.tensor_parallel_size,
            f"at most {MAX_WORLD_SIZE} workers in all, and with {self.pipeline_parallel_size} stages there "
            f"would be {size}",
        )
        require(0 <= self.rank < size, "rank", self.rank, f"below the number of workers, which is {size}")
