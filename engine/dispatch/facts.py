"""What a worker tells a scheduler about itself."""

from __future__ import annotations

from dataclasses import dataclass

from engine.dispatch.adapters import AdapterFacts
from engine.dispatch.limits import EngineLimits


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker's model and limits, as sent in the Welcome message of the handshake.

    Attributes:
        model: name or path of the model it loaded.
        limits: what it can take.
        eos_token_ids: tokens that end a completion.
        dtype: number format of activations, and of weights that are not quantized, such as "float32".
        device: where it runs, such as "cpu" or "cuda:0 NVIDIA H200".
        rank, world_size: its place among the workers that share the model.
        num_stages: pipeline stages of the group; ranks of one stage are neighbours.
        fingerprint: identity of the weights and the tokenizer: equal for copies of a checkpoint, different
            for any other.
        task: what the model is for: "generate"; "classify" for one with a classification head; "embed" for
            one without any head.
        labels: the names of the classes, limits.num_labels of them.
        kernels: what computes, such as "native avx2, 2 threads"; "" where there is nothing to tell.
        weights: what they take by number format, such as "97 MB: Q4_1 66, Q6_K 31"; "" if it does not say.
        quantization: how the weights are quantized, such as "gptq, 4 bits in groups of 128"; "" for plain
            numbers.
        kv_cache_dtype: number format of keys and values, such as "float8_e4m3fn"; "" if it does not say.
        adapters: those that it has loaded, the oldest first.
        more_ahead: it has work that makes later steps faster, for plans with `work_ahead`.
    """

    model: str
    limits: EngineLimits
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    rank: int = 0
    world_size: int = 1
    num_stages: int = 1
    fingerprint: str = ""
    more_ahead: bool = False
    task: str = "generate"
    labels: tuple[str, ...] = ()
    kernels: str = ""
    weights: str = ""
    quantization: str = ""
    kv_cache_dtype: str = ""
    adapters: tuple[AdapterFacts, ...] = ()

    @property
    def reporting_rank(self) -> int:
        """The rank whose results have the sampled tokens: the first one of the last stage."""
        return self.world_size - self.world_size // self.num_stages
