"""An observation as the console reads it: JSON, with a byte for each block in base64."""

from __future__ import annotations

import base64
from typing import Any

from pagewire.scheduler.v1 import scheduler_pb2

_SHOWN_OF_CLIENT = 6
_LOAD = (
    "num_requests_running",
    "num_requests_waiting",
    "num_clients_waiting",
    "num_used_blocks",
    "num_blocks",
    "max_num_seqs",
    "max_num_waiting",
    "num_steps_in_flight",
)
_TOTALS = (
    "steps",
    "computed_tokens",
    "generated_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "evictions",
    "ended_requests",
    "worker_losses",
)
_REQUEST = (
    "number",
    "running",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_computed_tokens",
    "num_output_tokens",
    "max_total_tokens",
    "num_blocks",
    "num_preemptions",
    "adapter_id",
)


def engine_event(
    message: scheduler_pb2.ObserveResponse | None,
    prefixes: scheduler_pb2.ObservedPrefixes | None,
    *,
    own: str,
    why: str,
) -> dict[str, Any]:
    """One event.

    Args:
        message: the observation; None if the scheduler cannot be observed.
        prefixes: the prefixes to tell of if the message has none.
        own: what the client of the watcher's own requests begins with. Of others no request id is told.
        why: if there is no message, why there is none.
    """
    if message is None:
        return {"state": "no_scheduler", "why": why}
    if message.HasField("prefixes"):
        prefixes = message.prefixes
    return {
        "state": "serving" if message.ready else "no_engine",
        "time": message.time,
        "load": {name: getattr(message.load, name) for name in _LOAD},
        "totals": {name: getattr(message.totals, name) for name in _TOTALS},
        "ttft": _latency(message.time_to_first_token),
        "itl": _latency(message.inter_token_latency),
        "steps": [_step(step) for step in message.steps],
        "num_steps_left_out": message.num_steps_left_out,
        "requests": [_request(request, own) for request in message.requests],
        "blocks": {
            "stride": message.blocks.stride,
            "ref_counts": _text(message.blocks.ref_counts),
            "cached": _text(message.blocks.cached),
            "owners": _text(message.blocks.owners),
        },
        "prefixes": None if prefixes is None else _prefixes(prefixes),
    }


def _latency(latency: scheduler_pb2.ObservedLatency) -> dict[str, float] | None:
    """None where nothing was measured."""
    if not latency.count:
        return None
    return {"count": latency.count, "p50": latency.p50, "p95": latency.p95}


def _step(step: scheduler_pb2.ObservedStep) -> dict[str, Any]:
    return {
        "id": step.step_id,
        "ended": step.ended,
        "execute_us": list(step.execute_us),
        "num_decodes": step.num_decodes,
        "num_prompt_tokens": step.num_prompt_tokens,
        "failed": step.failed,
    }


def _request(request: scheduler_pb2.ObservedRequest, own: str) -> dict[str, Any]:
    key, _, user = request.client.partition("/")
    return {
        **{name: getattr(request, name) for name in _REQUEST},
        "age": round(request.age, 3),
        "client": f"{key[:_SHOWN_OF_CLIENT]}/{user[:_SHOWN_OF_CLIENT]}",
        "request_id": request.request_id if request.client.startswith(own) else None,
    }


def _prefixes(prefixes: scheduler_pb2.ObservedPrefixes) -> dict[str, Any]:
    return {
        "nodes": [
            [node.first_block, node.parent, node.num_blocks, node.num_hits, node.num_held]
            for node in prefixes.nodes
        ],
        "num_left_out": prefixes.num_left_out,
        "roots": _text(prefixes.roots),
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
