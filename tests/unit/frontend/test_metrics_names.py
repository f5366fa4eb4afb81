"""The scheduler's metrics under other servers' names."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from frontend.metrics_names import VLLM_NAMES, named, triton_gpu_lines
from pagewire.telemetry.gpus import GpuReading
from scheduler.serve.metrics import SchedulerMetrics

OWN_NAMES = {  # of metrics that Prometheus' dashboards of vLLM show
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries"),
    *("prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "request_success"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    "iteration_tokens_total",
}


async def exposition() -> str:
    metrics = SchedulerMetrics(lambda: None, "inflight")
    metrics.time_to_first_token.observe(0.1)
    metrics._gpus.read = lambda: [GpuReading(0, "GPU-1", 0.5, 10, 20)]  # type: ignore[method-assign]
    return (await metrics.exposition()).decode()


def families(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by family. Raises if a family is told in two places."""
    read: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in read
        assert family.documentation
        assert family.type != "unknown"
        read[family.name] = [(sample.labels, sample.value) for sample in family.samples]
    return read


async def test_both_names_tell_the_same() -> None:
    ours = families(await exposition())
    both = families(named(await exposition(), "both", 'a "model"'))
    assert ours.items() <= both.items()
    for name in OWN_NAMES:
        samples = both[f"vllm:{name}"]
        assert [value for _, value in samples] == [value for _, value in ours[f"pagewire:{name}"]]
        assert all(labels["model_name"] == 'a "model"' for labels, _ in samples)
    assert set(VLLM_NAMES) >= OWN_NAMES


async def test_one_name_each() -> None:
    text = await exposition()
    assert named(text, "pagewire", "m") == text
    only = families(named(text, "vllm", "m"))
    assert "vllm:num_requests_running" in only
    assert "pagewire:num_requests_running" not in only
    assert "pagewire:step_execute_time_seconds" in only


async def test_gpus_have_tritons_names_too() -> None:
    gpus = families(triton_gpu_lines(await exposition()))
    assert gpus["nv_gpu_utilization"] == [({"gpu": "0", "gpu_uuid": "GPU-1"}, 0.5)]
    assert set(gpus) == {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}
    metrics = SchedulerMetrics(lambda: None, "inflight")
    metrics._gpus.read = list  # type: ignore[method-assign, assignment]
    assert triton_gpu_lines((await metrics.exposition()).decode()) == ""
