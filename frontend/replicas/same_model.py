"""Whether several schedulers serve the same model, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from pagewire.scheduler.v1 import scheduler_pb2

_MUST_AGREE = ("fingerprint", "vocab_size", "eos_token_ids", "task", "labels", "hidden_size")
_LEAST = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")


def why_another_model(
    model: scheduler_pb2.GetModelResponse, reference: scheduler_pb2.GetModelResponse
) -> str:
    """What differs, for people; empty if a request that began at one scheduler can continue at the other."""
    for name in _MUST_AGREE:
        ours, theirs = getattr(model, name), getattr(reference, name)
        if ours != theirs:
            return f"it serves {model.model}, whose {name} is {_shown(ours)}, not {_shown(theirs)}"
    return ""


def common_facts(models: Sequence[scheduler_pb2.GetModelResponse]) -> scheduler_pb2.GetModelResponse:
    """The first one's facts, with limits that hold for all, and the adapters that any of them has: a request
    for one goes to a scheduler that has it."""
    common = scheduler_pb2.GetModelResponse()
    common.CopyFrom(models[0])
    for name in _LEAST:
        setattr(common, name, min(getattr(model, name) for model in models))
    known = {adapter.adapter_id for adapter in common.adapters}
    for adapter in (adapter for model in models for adapter in model.adapters):
        if adapter.adapter_id not in known:
            known.add(adapter.adapter_id)
            common.adapters.append(adapter)
    return common


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (str, int)) else str(list(value))  # type: ignore[call-overload]
