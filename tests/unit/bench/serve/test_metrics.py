"""Figures by their definitions."""

from __future__ import annotations

import math
import re
from array import array
from typing import Any

import pytest

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.health import Health
from pagewire.bench.serve.metrics import Objectives, client_health, rows, summarize

NONE = Objectives({})


def answer(index: int = 0, sent: float = 0.0, times: tuple[float, ...] = (), **fields: Any) -> Answer:
    """One whose pieces arrive at `times` and that ends with the last, unless told otherwise."""
    known = {"ended": times[-1] if times else math.nan, "finish_reason": "length", "wanted_len": len(times)}
    return Answer(index, **{"prompt_len": 10, "sent": sent, "times": array("d", times), **known, **fields})


def test_latencies_of_one_request() -> None:
    result = summarize([answer(sent=1.0, times=(1.5, 1.6, 1.8), ended=1.9)], NONE)
    assert result["ttft_ms"]["mean"] == 500
    assert result["e2e_ms"]["p99"] == 900
    assert result["tpot_ms"]["p50"] == 200  # (900 - 500) / 2
    assert (result["itl_ms"]["mean"], result["itl_ms"]["max"]) == (150, 200)
    assert result["seconds"] == 0.9
    assert result["output_tokens_per_s"] == pytest.approx(3 / 0.9, rel=1e-3)
    assert result["total_tokens_per_s"] == pytest.approx(13 / 0.9, rel=1e-3)
    assert "goodput" not in result


def test_tokens_are_the_servers_where_it_counts_them() -> None:
    both = [
        answer(times=(1.0, 2.0), output_tokens=9, prompt_tokens=7, cached_tokens=4),
        answer(1, times=(1.0, 2.0)),
    ]
    result = summarize(both, NONE)
    assert (result["output_tokens"], result["input_tokens"], result["cached_input_tokens"]) == (11, 17, 4)
    assert result["outputs"] == 4
    assert result["output_tokens_counted_by"] == "server for 1, pieces of output for the rest"
    assert result["wrong_output_length"] == 1
    assert result["tpot_ms"]["max"] == 1000  # the other has (2 - 1) / 8


def test_one_token_has_neither_tpot_nor_itl() -> None:
    result = summarize([answer(times=(0.2,))], Objectives({"tpot": 1, "itl": 1}))
    assert result["tpot_ms"] is None
    assert result["itl_ms"] is None
    assert result["goodput"]["good"] == 1


def test_failures_are_counted_by_kind_and_are_no_throughput() -> None:
    failed = [answer(index, times=(0.1,), error="HTTP 429: full", ended=0.2) for index in range(3)]
    unfinished = answer(9, times=(0.1, 0.3), ended=math.nan)
    result = summarize(
        [*failed, answer(4, error="timeout", ended=2.0), answer(5, times=(1.0,)), unfinished], NONE
    )
    assert result["errors"] == {"HTTP 429: full": 3, "timeout": 1}
    assert result["requests"] == {"sent": 6, "complete": 1, "failed": 4, "unfinished": 1, "resent": 0}
    assert (result["output_tokens"], result["seconds"]) == (1, 2.0)
    assert result["requests_per_s"] == 0.5


def test_a_run_without_answers_has_figures_too() -> None:
    result = summarize([], Objectives({"ttft": 1}))
    assert (result["requests_per_s"], result["ttft_ms"], result["most_open"]) == (0, None, 0)
    assert result["goodput"]["share_of_sent"] == 0
    assert client_health([], [])["warnings"] == []


def test_goodput_counts_what_meets_every_objective() -> None:
    answers = [
        answer(0, times=(0.1, 0.2)),  # good
        answer(1, times=(0.3, 0.4)),  # TTFT too long
        answer(2, times=(0.1, 0.1, 0.1, 0.5)),  # a gap too long, though TPOT is not
        answer(3, times=(0.1,), error="HTTP 500: no", ended=2.0),
    ]
    met = {"ttft": [0, 2], "itl": [0, 1], "e2e": [0, 1, 2]}
    limits = {"ttft": 200.0, "itl": 150.0, "e2e": 501.0}
    for name, good in met.items():
        assert summarize(answers, Objectives({name: limits[name]}))["goodput"]["good"] == len(good)
    result = summarize(answers, Objectives.parse(["ttft=200", "tpot=150", "itl=150"]))
    assert result["goodput"] == {
        "slo_ms": {"ttft": 200, "tpot": 150, "itl": 150},
        "good": 1,
        "requests_per_s": 0.5,
        "share_of_sent": 0.25,
    }


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=", "ttft=fast", "ttft=0", "ttft=nan", "ttft=inf", "latency=3"]
)
def test_an_objective_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="it must be one of ttft, tpot, itl, e2e"):
        Objectives.parse([text])


def test_the_most_requests_open_at_once() -> None:
    spans = [(0.0, 4.0), (1.0, 2.0), (2.0, 3.0), (2.5, 5.0)]
    answers = [answer(index, sent=begin, times=(end,)) for index, (begin, end) in enumerate(spans)]
    assert summarize(answers, NONE)["most_open"] == 3


def health(cpu: float = 0.1, lag: float = 0.0001) -> Health:
    return Health(cpu, 1.0, array("d", [lag] * 100))


@pytest.mark.parametrize(
    ("healths", "late", "warning"),
    [
        ([health()], 0.001, None),
        ([health(), health(cpu=0.95)], 0.001, "used 95% of a core.*try more --processes"),
        ([health(cpu=0.6, lag=0.02)], 0.001, "event loop was late by 20.0 ms.*try more --processes"),
        ([health(lag=0.02)], 0.001, "event loop was late by 20.0 ms.*it had to wait for a processor"),
        ([health()], 0.03, "sent 30.0 ms later than due.*it had to wait for a processor"),
    ],
)
def test_a_load_generator_at_its_limit_says_so(
    healths: list[Health], late: float, warning: str | None
) -> None:
    found = client_health(healths, [answer(sent=late, due=0.0, times=(1.0, 2.0))])
    assert found["cpu_us_per_output"] == pytest.approx(sum(each.cpu_seconds for each in healths) / 2 * 1e6)
    warnings = found["warnings"]
    assert len(warnings) == (warning is not None)
    assert all(re.search(str(warning), each) for each in warnings)


def test_rows_are_in_order_and_hold_each_requests_own_figures() -> None:
    answers = [answer(1, sent=5.0, times=(5.5, 5.75)), answer(0, sent=4.0, error="timeout", ended=9.0)]
    first, second = rows(answers)
    assert (first["index"], first["error"], first["sent_s"]) == (0, "timeout", 0)
    assert "ttft_ms" not in first
    assert (second["sent_s"], second["ttft_ms"], second["itl_ms"], second["e2e_ms"]) == (1, 500, [250], 750)
