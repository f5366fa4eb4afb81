"""What is measured is what was asked for: exact lengths, counted steps, prefixes shared only where wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.bench.engine import BenchEngine
from pagewire.bench.latency import measure_latency
from pagewire.bench.throughput import measure_throughput
from pagewire.bench.workloads import Lengths, Workload
from tests.unit.engine.tiny_model import write_model

SHARED = Workload(
    name="shared",
    num_requests=6,
    prompt=Lengths(3, 20),
    output=Lengths(2, 7),
    shared_prefix=64,
    prefix_caching=True,
)
PLAIN = Workload(name="plain", num_requests=5, prompt=Lengths(40, 40), output=Lengths(9, 9))
PREFILL = Workload(name="prefill", num_requests=5, prompt=Lengths(40, 40), output=Lengths(1, 1))
TIGHT = Workload(name="tight", num_requests=6, prompt=Lengths(48, 48), output=Lengths(60, 60))
OPTIONS = {"device": "cpu", "num_blocks": 30, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[BenchEngine]:
    with BenchEngine(str(model), [SHARED], OPTIONS) as engine:
        engine.warm_up()
        yield engine


def test_a_run_has_exactly_the_tokens_of_its_workload_and_its_steps_account_for_them(
    engine: BenchEngine,
) -> None:
    result = measure_throughput(engine, PLAIN, repeat=3)
    assert (result["input_tokens"], result["output_tokens"]) == (200, 45)
    assert result["unit"] == "output_tokens_per_s"
    figures = [run["output_tokens_per_s"] for run in result["runs"]]
    assert result["tokens_per_s"] == sorted(figures)[1] > 0
    steps = result["steps"]
    for run in result["runs"]:
        assert run["output_tokens_per_s"] == pytest.approx(45 / run["seconds"], rel=0.01)
        assert run["num_steps"] == steps["num_steps"]
        assert (run["num_preemptions"], run["prefix_cache_hits"]) == (0, 0)
    # 200 prompt tokens in steps of 64, and of each output all but the last token are computed too
    assert steps["num_generated_tokens"] == 45
    assert steps["num_computed_tokens"] == 200 + 5 * 8
    assert steps["num_steps"] == steps["decode_steps"]["count"] + steps["prefill_steps"]["count"]
    assert steps["prefill_steps"]["count"] == 4
    assert steps["prefill_steps"]["mean_tokens"] > 40
    assert steps["decode_steps"]["mean_tokens"] == steps["decode_steps"]["mean_requests"]
    assert steps["mean_execute_us"] > 0
    assert 0 < steps["schedule_us"] < steps["step_us"]


def test_a_workload_without_output_counts_its_input(engine: BenchEngine) -> None:
    result = measure_throughput(engine, PREFILL, repeat=1)
    assert result["unit"] == "input_tokens_per_s"
    assert result["tokens_per_s"] == result["runs"][0]["input_tokens_per_s"]
    assert result["output_tokens"] == 5


def test_prefixes_are_shared_within_a_run_where_the_workload_says_so_and_never_across_runs(
    engine: BenchEngine,
) -> None:
    hits = [run["prefix_cache_hits"] for run in measure_throughput(engine, SHARED, 2)["runs"]]
    # the first request computes the 64 shared tokens, the five after it find them
    assert hits == [5 * 64, 5 * 64]
    [unshared] = measure_throughput(engine, replace(SHARED, prefix_caching=False), 1)["runs"]
    assert unshared["prefix_cache_hits"] == 0


def test_preemptions_and_a_full_pool_are_reported(engine: BenchEngine) -> None:
    steps = measure_throughput(engine, TIGHT, repeat=1)["steps"]
    assert steps["num_preemptions"] > 0
    assert steps["most_blocks_used"] == 30


def test_latency_has_a_sample_for_every_request_and_token(engine: BenchEngine) -> None:
    result = measure_latency(engine, PLAIN, batch_size=2, repeat=2)
    assert (result["batch_size"], result["num_requests"]) == (2, 10)
    ttft, tpot, itl, e2e = (result[f"{name}_ms"] for name in ("ttft", "tpot", "itl", "e2e"))
    assert 0 < ttft["p50"] <= ttft["p90"] <= ttft["p99"] <= ttft["max"]
    assert tpot["mean"] == pytest.approx(itl["mean"], rel=0.01)
    assert e2e["mean"] == pytest.approx(ttft["mean"] + 8 * tpot["mean"], rel=0.01)
    assert "tpot_ms" not in measure_latency(engine, PREFILL, batch_size=None, repeat=1)


def test_a_workload_too_long_for_the_engine_is_refused(engine: BenchEngine) -> None:
    long = Workload(name="long", num_requests=1, prompt=Lengths(200, 200), output=Lengths(57, 57))
    with pytest.raises(ConfigError, match=r"long \(1 x 200/57\) has requests of 257 tokens.* is 256;"):
        engine.check(long)
