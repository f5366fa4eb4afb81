"""GET /v1/requests/{id}: what happened to a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aiohttp import web

from frontend.caller import caller
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.errors import error_response
from frontend.http.failure import Failure
from frontend.http.json_text import json_response
from pagewire.base.errors import NotFound
from pagewire.scheduler.v1 import scheduler_pb2 as pb

_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_", "embd-")
"""What the APIs put before a request's id in their answers' ids."""

_REASONS = {
    pb.END_REASON_STOP: "stop",
    pb.END_REASON_LENGTH: "length",
    pb.END_REASON_ABORT: "abort",
    pb.END_REASON_ERROR: "error",
}
_MOMENTS = {
    "received": "received",
    "queued": "queued",
    "scheduled": "scheduled",
    "first_token": "first token",  # nosec B105 # no password
    "last_token": "last token",  # nosec B105 # no password
    "ended": "finished",
}
"""Fields of Timeline and what their events are called."""


class TimelineHandlers:
    """Asks the scheduler, which knows the requests of all frontends."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def get(self, request: web.Request) -> web.Response:
        """GET /v1/requests/{id}"""
        given = request.match_info["id"]
        for request_id in _ids(given):
            try:
                parts = await self._pipeline.link.get_timeline(request_id, caller())
            except NotFound:
                continue
            return json_response(answer(request_id, parts))
        message = (
            f"no request {given!r} of yours is known; the server remembers those that are open and the last "
            "ones that ended (--request-history)"
        )
        return error_response(
            request.path, Failure(status=404, message=message, code="not_found", param="id")
        )


def _ids(given: str) -> Iterator[str]:
    """What was given, and without an API's prefix."""
    yield given
    for prefix in _PREFIXES:
        if given.startswith(prefix):
            yield given.removeprefix(prefix)


def answer(request_id: str, parts: Sequence[pb.Timeline]) -> dict[str, Any]:
    """The answer's JSON: the request as a whole, and everything in order of time. Times are in seconds of
    Unix time; null is what has not happened, or not in every part where that is what counts.
    """
    ended = _over(parts, "ended", max, of_all=True)
    moments = {
        "received": _over(parts, "received", min),
        "queued": _over(parts, "queued", min),
        "first_scheduled": _over(parts, "scheduled", min),
        "first_token": _over(parts, "first_token", min),
        "last_token": _over(parts, "last_token", max),
        "finished": ended,
    }
    running = any(part.running for part in parts)
    reasons = [_REASONS[part.reason] for part in parts if part.reason in _REASONS]
    return {
        "id": request_id,
        "object": "request.timeline",
        "status": "finished" if ended is not None else "running" if running else "waiting",
        "trace_id": parts[0].trace_id or None,
        **moments,
        "durations": _durations(moments),
        "finish_reasons": reasons,
        "error": next((part.error for part in parts if part.error), None),
        "prompt_tokens": sum(part.num_prompt_tokens for part in parts),
        "cached_tokens": sum(part.num_cached_tokens for part in parts),
        "output_tokens": sum(part.num_output_tokens for part in parts),
        "preemptions": sum(part.num_preemptions for part in parts),
        "worker_restarts": max(part.num_worker_losses for part in parts),
        "parts": len(parts),
        "events": sorted(_events(parts), key=lambda event: event["time"]),
    }


def _over(
    parts: Sequence[pb.Timeline], name: str, choose: Callable[[list[float]], float], *, of_all: bool = False
) -> float | None:
    """The first or last time of something in any part; with `of_all` only if it is known of all of them."""
    times = [getattr(part, name) for part in parts if part.HasField(name)]
    return choose(times) if times and (len(times) == len(parts) or not of_all) else None


def _durations(moments: dict[str, float | None]) -> dict[str, float | None]:
    """Seconds from one moment to another, as far as both are there."""

    def between(first: str, second: str) -> float | None:
        start, end = moments[first], moments[second]
        return None if start is None or end is None else max(round(end - start, 6), 0.0)

    return {
        "tokenize": between("received", "queued"),
        "queue": between("queued", "first_scheduled"),
        "prefill": between("first_scheduled", "first_token"),
        "decode": between("first_token", "last_token"),
        "total": between("received", "finished"),
    }


def _events(parts: Sequence[pb.Timeline]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for field, name in _MOMENTS.items():
            if part.HasField(field) and (field != "received" or part is parts[0]):
                detail = ""
                if field == "scheduled" and part.num_cached_tokens:
                    detail = f"{part.num_cached_tokens} tokens from the prefix cache"
                yield _event(part, getattr(part, field), name, detail)
        for event in part.events:
            yield _event(part, event.time, event.name, event.detail)


def _event(part: pb.Timeline, time: float, name: str, detail: str) -> dict[str, Any]:
    return {"time": time, "event": name, "part": part.part, "detail": detail or None}
