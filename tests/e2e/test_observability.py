"""Traces, logs and timelines of a real service, while one of its processes is killed, too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import grpc
import httpx
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.telemetry.context import new_trace
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, receiving
from tools.service import Service

# The supervisor writes down what its processes say a moment after they have said it.
LOG_SECONDS = 10.0
IN_FRONTEND = {"tokenize", "detokenize"}
IN_SCHEDULER = {"queue", "prefill", "decode"}
IN_WORKER = {"worker.prefill", "worker.decode"}
INSIDE = {*IN_FRONTEND, *IN_SCHEDULER, *IN_WORKER, "scheduler.request"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, smollm2_dir: object, receiver: OtlpReceiver
) -> Iterator[Service]:
    """It traces everything and logs JSON. A step takes 5 ms, so that requests last."""
    options = ("--engine", "null", "--null-step-ms", "5", "--log-format", "json", "--api-key", "k")
    tracing = ("--otlp-traces-endpoint", receiver.http_endpoint)
    with Service(
        tmp_path_factory.mktemp("observed"),
        options=(*options, *tracing),
        environment={"OTEL_BSP_SCHEDULE_DELAY": "100"},
    ) as service:
        yield service


def complete(service: Service, request_id: str, traceparent: str, max_tokens: int) -> dict[str, object]:
    headers = {"traceparent": traceparent, "authorization": "Bearer k", "x-request-id": request_id}
    body = {"prompt": "Once upon a time", "max_tokens": max_tokens}
    response = httpx.post(f"{service.http_url}/v1/completions", json=body, headers=headers, timeout=60)
    return response.raise_for_status().json()


def timeline(service: Service, request_id: str) -> httpx.Response:
    headers = {"authorization": "Bearer k"}
    return httpx.get(f"{service.http_url}/v1/requests/{request_id}", headers=headers, timeout=30)


def by_name(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
    return {span.name: span for span in spans}


def check_tree(spans: dict[str, ReceivedSpan], server: str, caller: str) -> None:
    """Every span is where it belongs, below the caller's, and begins and ends within its parent."""
    parents = {
        **dict.fromkeys((*IN_FRONTEND, "scheduler.request"), server),
        **dict.fromkeys((*IN_SCHEDULER, *IN_WORKER), "scheduler.request"),
    }
    assert spans[server].parent_id == caller
    for child, parent in parents.items():
        assert spans[child].parent_id == spans[parent].span_id, child
        assert spans[child].start >= spans[parent].start - 0.01, child
        assert spans[child].end <= spans[parent].end + 0.05, child
    services = {name: span.service for name, span in spans.items()}
    assert {services[name] for name in (server, *IN_FRONTEND)} == {"pagewire-frontend"}
    assert {services[name] for name in ("scheduler.request", *IN_SCHEDULER)} == {"pagewire-scheduler"}
    assert {services[name] for name in IN_WORKER} == {"pagewire-engine-worker"}
    assert spans["queue"].end == spans["prefill"].start
    assert spans["prefill"].end == spans["decode"].start


def test_a_trace_over_http_reaches_from_the_caller_to_the_worker(
    service: Service, receiver: OtlpReceiver
) -> None:
    caller = new_trace()
    complete(service, "over-http", caller.traceparent, 20)
    server = "POST /v1/completions"
    found = receiver.trace(caller.trace_id, lambda spans: {span.name for span in spans} >= {*INSIDE, server})
    spans = by_name(found)
    assert len(found) == len(spans) == len(INSIDE) + 1
    check_tree(spans, server, caller.span_id)
    assert spans[server].attributes["http.response.status_code"] == 200
    assert spans[server].attributes["pagewire.request_id"] == "over-http"
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 20


async def test_a_trace_over_grpc_reaches_from_the_caller_to_the_worker(
    service: Service, receiver: OtlpReceiver
) -> None:
    caller = new_trace()
    metadata = (("traceparent", caller.traceparent), ("tracestate", "v=1"), ("authorization", "Bearer k"))
    async with grpc.aio.insecure_channel(service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(max_tokens=20))
        async for _ in stub.Generate(request, metadata=metadata):
            pass
    server = "pagewire.inference.v1.InferenceService/Generate"
    spans = by_name(
        receiver.trace(caller.trace_id, lambda spans: {span.name for span in spans} >= {*INSIDE, server})
    )
    check_tree(spans, server, caller.span_id)
    assert spans[server].attributes["rpc.grpc.status"] == "OK"
    assert spans[server].state == "v=1"


def test_a_killed_worker_is_seen_in_the_requests_spans_and_timeline(
    service: Service, receiver: OtlpReceiver
) -> None:
    caller = new_trace()
    with httpx.stream(
        "POST",
        f"{service.http_url}/v1/completions",
        json={"prompt": "Once", "max_tokens": 300, "stream": True},
        headers={"traceparent": caller.traceparent, "authorization": "Bearer k", "x-request-id": "killed"},
        timeout=60,
    ) as response:
        lines = response.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        time.sleep(0.6)  # spans leave the worker in batches
        running = timeline(service, "killed").json()
        service.processes()["engine-worker"].kill()
        assert list(filter(None, lines))[-1] == "data: [DONE]"
    assert (running["status"], running["finished"], running["worker_restarts"]) == ("running", None, 0)

    def complete_trace(spans: list[ReceivedSpan]) -> bool:
        names = [span.name for span in spans]
        return names.count("worker.prefill") == 2 and {*INSIDE, "POST /v1/completions"} <= set(names)

    found = receiver.trace(caller.trace_id, complete_trace)
    spans = by_name(found)
    request = spans["scheduler.request"]
    assert list(request.events) == ["worker lost", "worker attached"]
    assert "died" in request.events["worker lost"]["pagewire.detail"]
    assert request.attributes["pagewire.worker_losses"] == 1
    assert list(spans["POST /v1/completions"].events) == ["engine lost", "engine attached"]
    # What the killed worker had noted was exported, by the process that outlived it.
    in_workers = sorted((span.start, span.parent_id) for span in found if span.name == "worker.prefill")
    assert [parent for _, parent in in_workers] == [request.span_id] * 2

    told = timeline(service, "killed").json()
    assert (told["status"], told["worker_restarts"], told["output_tokens"]) == ("finished", 1, 300)
    assert told["trace_id"] == caller.trace_id
    moments = ("received", "queued", "first_scheduled", "first_token", "last_token", "finished")
    times = [told[moment] for moment in moments]
    assert times == sorted(times)
    names = [event["event"] for event in told["events"]]
    assert names.index("worker lost") < names.index("worker attached") < names.index("finished")


def test_a_caller_that_does_not_sample_is_not_traced(service: Service, receiver: OtlpReceiver) -> None:
    unsampled, later = new_trace(), new_trace()
    complete(service, "unsampled", f"00-{unsampled.trace_id}-{unsampled.span_id}-00", 3)
    complete(service, "later", later.traceparent, 3)
    receiver.trace(later.trace_id, lambda spans: "scheduler.request" in {span.name for span in spans})
    assert unsampled.trace_id not in {span.trace_id for span in receiver.spans}
    assert timeline(service, "unsampled").json()["trace_id"] is None


def test_every_process_logs_json_with_the_ids_of_request_and_trace(
    service: Service, receiver: OtlpReceiver
) -> None:
    caller = new_trace()
    complete(service, "logged", caller.traceparent, 3)
    mine: list[dict[str, object]] = []
    deadline = time.monotonic() + LOG_SECONDS
    while not mine:
        assert time.monotonic() < deadline, service.log
        whole_lines, _, _ = service.log.rpartition("\n")
        entries = [json.loads(line) for line in whole_lines.splitlines()]
        mine = [entry for entry in entries if entry.get("request_id") == "logged"]
        time.sleep(0.02)
    assert {entry["process"] for entry in entries} == {"supervisor", "frontend", "scheduler", "engine-worker"}
    [logged] = mine
    assert (logged["logger"], logged["trace_id"]) == ("frontend.access", caller.trace_id)
    assert logged["outcome"] == "200"
