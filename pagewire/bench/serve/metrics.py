"""From answers to figures: latencies, throughput, goodput, errors by kind.

TTFT is the time from sending a request to its first piece of output, ITL the gaps between pieces, E2E the
time to its end, TPOT (E2E - TTFT) / (n - 1) for n output tokens. Percentiles interpolate between ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagewire.base.errors import ConfigError
from pagewire.bench.percentiles import spread
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.health import MAX_CPU, MAX_LAG_MS, Health

BUSY_CPU = 0.5
"""Below this share of a core, a process of the load generator that is late is kept waiting by others."""
OBJECTIVES = ("ttft", "tpot", "itl", "e2e")
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objectives:
    """The most milliseconds that a good request may take, by measure; of its ITL, the longest gap."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Objectives:
        """From "ttft=200" and the like.

        Raises:
            ConfigError: one is not of that form.
        """
        limits = {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if name not in OBJECTIVES or not 0 < limit < math.inf:
                raise ConfigError(
                    f"slo is {text!r}; it must be one of {', '.join(OBJECTIVES)}, '=' and milliseconds, "
                    "such as ttft=200",
                    param="slo",
                )
            limits[name] = limit
        return cls(limits)

    def are_met(self, latency: Latency) -> bool:
        """Whether a request was good. One token has no TPOT and no ITL that could be too long."""
        values = {
            "ttft": latency.ttft,
            "tpot": latency.tpot,
            "itl": float(latency.itl.max()) if latency.itl.size else math.nan,
            "e2e": latency.e2e,
        }
        return not any(values[name] * 1000 > limit for name, limit in self.limits.items())


@dataclass(frozen=True, slots=True)
class Latency:
    """One complete request's, in seconds; NaN where it has none."""

    ttft: float
    tpot: float
    itl: Floats
    e2e: float

    @classmethod
    def of(cls, answer: Answer) -> Latency:
        """Of a request that was answered to its end."""
        e2e = answer.ended - answer.sent
        ttft = answer.times[0] - answer.sent if answer.times else math.nan
        count = answer.num_outputs
        tpot = (e2e - ttft) / (count - 1) if count > 1 else math.nan
        return cls(ttft, tpot, np.diff(np.frombuffer(answer.times)), e2e)


def summarize(answers: Sequence[Answer], objectives: Objectives) -> dict[str, Any]:
    """The figures of a run. Throughput counts complete requests, over the time from the first send to the
    last end of any request."""
    complete = [answer for answer in answers if answer.is_complete]
    failed = [answer for answer in answers if answer.error]
    latencies = [Latency.of(answer) for answer in complete]
    seconds = _seconds(answers)
    inputs = sum(answer.num_inputs for answer in complete)
    outputs = sum(answer.num_outputs for answer in complete)
    result: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "requests": {
            "sent": len(answers),
            "complete": len(complete),
            "failed": len(failed),
            "unfinished": len(answers) - len(complete) - len(failed),
            "resent": sum(answer.retries for answer in answers),
        },
        "errors": dict(Counter(answer.error for answer in failed).most_common()),
        "finish_reasons": dict(Counter(answer.finish_reason for answer in complete).most_common()),
        "input_tokens": inputs,
        "cached_input_tokens": sum(answer.cached_tokens or 0 for answer in complete),
        "output_tokens": outputs,
        "outputs": sum(len(answer.times) for answer in complete),
        "output_tokens_counted_by": _counted_by(complete),
        "wrong_output_length": sum(answer.num_outputs != answer.wanted_len for answer in complete),
        "requests_per_s": round(len(complete) / seconds, 3),
        "output_tokens_per_s": round(outputs / seconds, 2),
        "total_tokens_per_s": round((inputs + outputs) / seconds, 2),
        "most_open": _most_open(answers),
        "ttft_ms": spread(latency.ttft for latency in latencies),
        "tpot_ms": spread(latency.tpot for latency in latencies),
        "itl_ms": spread(np.concatenate([latency.itl for latency in latencies]) if latencies else ()),
        "e2e_ms": spread(latency.e2e for latency in latencies),
    }
    if objectives.limits:
        good = sum(map(objectives.are_met, latencies))
        result["goodput"] = {
            "slo_ms": objectives.limits,
            "good": good,
            "requests_per_s": round(good / seconds, 3),
            "share_of_sent": round(good / len(answers), 4) if answers else 0.0,
        }
    return result


def client_health(health: Sequence[Health], answers: Sequence[Answer]) -> dict[str, Any]:
    """What the load generator itself needed, and `warnings` where its limits may be what was measured."""
    cpu = max((each.cpu_seconds / each.wall_seconds for each in health if each.wall_seconds), default=0.0)
    lag = spread(np.concatenate([np.frombuffer(each.delays) for each in health])) if health else None
    late = spread(answer.sent - answer.due for answer in answers)
    pieces = sum(len(answer.times) for answer in answers)
    cpu_seconds = sum(each.cpu_seconds for each in health)
    return {
        "processes": len(health),
        "cpu_seconds": round(cpu_seconds, 3),
        "busiest_cpu_share": round(cpu, 3),
        "cpu_us_per_output": round(cpu_seconds / pieces * 1e6, 2) if pieces else None,
        "loop_lag_ms": lag,
        "sent_late_ms": late,
        "warnings": _warnings(cpu, lag, late),
    }


def _warnings(cpu: float, lag: dict[str, float] | None, late: dict[str, float] | None) -> list[str]:
    advice = "the figures may be the load generator's limit, not the server's; try more --processes"
    if cpu < BUSY_CPU:
        advice = "it had to wait for a processor; run it where other programs leave it one"
    found = []
    if cpu > MAX_CPU:
        found.append(f"a process of the load generator used {cpu:.0%} of a core: {advice}")
    if lag is not None and lag["p99"] > MAX_LAG_MS:
        found.append(f"the load generator's event loop was late by {lag['p99']:.1f} ms (p99): {advice}")
    if late is not None and late["p99"] > MAX_LAG_MS:
        found.append(f"requests were sent {late['p99']:.1f} ms later than due (p99): {advice}")
    return found


def rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One entry a request, in order; times in seconds from the first send, latencies in milliseconds."""
    begin = min((answer.sent for answer in answers), default=0.0)
    return [_row(answer, begin) for answer in sorted(answers, key=lambda answer: answer.index)]


def _row(answer: Answer, begin: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": answer.index,
        "sent_s": round(answer.sent - begin, 6),
        "input_tokens": answer.num_inputs,
        "cached_input_tokens": answer.cached_tokens,
        "output_tokens": answer.num_outputs,
        "wanted_output_tokens": answer.wanted_len,
        "finish_reason": answer.finish_reason or None,
        "error": answer.error or None,
    }
    if answer.is_complete:
        latency = Latency.of(answer)
        row |= {
            "ttft_ms": _milliseconds(latency.ttft),
            "tpot_ms": _milliseconds(latency.tpot),
            "e2e_ms": _milliseconds(latency.e2e),
            "itl_ms": np.round(latency.itl * 1000, 3).tolist(),
        }
    return row


def _milliseconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1000, 3)


def _seconds(answers: Sequence[Answer]) -> float:
    """From the first send to the last known moment; never 0."""
    sent = [answer.sent for answer in answers if not math.isnan(answer.sent)]
    ended = [answer.ended for answer in answers if not math.isnan(answer.ended)]
    ended += [answer.times[-1] for answer in answers if answer.times]
    return max(max(ended, default=0.0) - min(sent, default=0.0), 1e-9)


def _counted_by(complete: Sequence[Answer]) -> str:
    counted = sum(answer.output_tokens is not None for answer in complete)
    if counted == len(complete):
        return "server"
    return "pieces of output" if not counted else f"server for {counted}, pieces of output for the rest"


def _most_open(answers: Sequence[Answer]) -> int:
    moments = [(answer.sent, 1) for answer in answers if not math.isnan(answer.sent)]
    moments += [(answer.ended, -1) for answer in answers if not math.isnan(answer.ended)]
    most = now = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most
