"""Metrics under the names that Triton and its TensorRT-LLM backend give them.

They are written here because Prometheus' own client would add _total to the names of counters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from frontend.inference_counters import FAILURE_REASONS, InferenceCounters
from frontend.metrics import FrontendMetrics
from frontend.triton.model import VERSION
from pagewire.scheduler.v1 import scheduler_pb2

_Sample: TypeAlias = tuple[dict[str, str], float]

_DURATIONS = {
    "request": "Time of requests that succeeded, from their arrival to their end",
    "queue": "Time that requests waited to be computed",
    "compute_input": "Time in which requests were read and their prompts tokenized",
    "compute_infer": "Time in which requests were computed and their texts sent",
    "compute_output": "Always 0: text is made while more is computed",
}


def exposition(
    metrics: FrontendMetrics,
    model: str,
    load: scheduler_pb2.GetLoadResponse | None,
    facts: scheduler_pb2.GetModelResponse | None,
) -> bytes:
    """Prometheus text format, version 0.0.4.

    Args:
        metrics: this frontend's.
        model: the served model's first name.
        load, facts: what the scheduler said; None if it did not.
    """
    labels = {"model": model, "version": VERSION}
    own = {**labels, "frontend": metrics.frontend}
    lines = [*_counters(metrics.inferences, own)]
    if load is not None:
        lines += _family(
            "nv_inference_pending_request_count",
            "gauge",
            "Requests that wait to be computed",
            [(labels, load.num_requests_waiting)],
        )
        blocks = {
            "max": load.num_blocks,
            "used": load.num_used_blocks,
            "free": load.num_blocks - load.num_used_blocks,
            "tokens_per": 0 if facts is None else facts.block_size,
        }
        lines += _family(
            "nv_trt_llm_kv_cache_block_metrics",
            "gauge",
            "KV blocks",
            [({**labels, "kv_cache_block_type": kind}, count) for kind, count in blocks.items()],
        )
    return "".join(line + "\n" for line in lines).encode()


def _counters(counted: InferenceCounters, labels: dict[str, str]) -> Iterator[str]:
    yield from _family(
        "nv_inference_request_success",
        "counter",
        "Requests that succeeded",
        [(labels, counted.successes)],
    )
    yield from _family(
        "nv_inference_request_failure",
        "counter",
        "Requests that failed",
        [({**labels, "reason": reason}, counted.failures[reason]) for reason in FAILURE_REASONS],
    )
    yield from _family(
        "nv_inference_count", "counter", "Prompts of requests that succeeded", [(labels, counted.inferences)]
    )
    for name, documentation in _DURATIONS.items():
        seconds = getattr(counted, name, 0.0)
        yield from _family(
            f"nv_inference_{name}_duration_us",
            "counter",
            f"{documentation}, in microseconds",
            [(labels, round(seconds * 1e6))],
        )


def _family(name: str, kind: str, documentation: str, samples: list[_Sample]) -> Iterator[str]:
    yield f"# HELP {name} {documentation}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{name}{{{inside}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
