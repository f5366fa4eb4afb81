"""The scheduler's model facts and load, as messages."""

from __future__ import annotations

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from scheduler.core import Scheduler


def model_message(facts: WorkerFacts, limits: EngineLimits, *, ready: bool) -> pb.GetModelResponse:
    """Facts about the model and the limits in force."""
    return pb.GetModelResponse(
        model=facts.model,
        vocab_size=facts.limits.vocab_size,
        max_model_len=facts.limits.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        block_size=facts.limits.block_size,
        num_blocks=facts.limits.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        dtype=facts.dtype,
        device=facts.device,
        hidden_size=facts.limits.hidden_size,
        ready=ready,
        takes_changes=True,
        task=facts.task,
        labels=facts.labels,
        kernels=facts.kernels,
        weights=facts.weights,
        quantization=facts.quantization,
        kv_cache_dtype=facts.kv_cache_dtype or facts.dtype,
        fingerprint=facts.fingerprint,
        max_loras=limits.max_loras,
    )


def load_message(core: Scheduler) -> pb.GetLoadResponse:
    """Current queue lengths and memory use."""
    return pb.GetLoadResponse(
        num_requests_running=core.num_running,
        num_requests_waiting=core.num_waiting,
        num_used_blocks=core.pool.num_used,
        num_blocks=core.pool.num_blocks,
        max_num_seqs=core.limits.max_num_seqs,
        max_num_waiting=core.settings.max_num_waiting,
        num_steps_in_flight=core.num_in_flight,
        num_clients_waiting=core.num_clients_waiting,
    )
