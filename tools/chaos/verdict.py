"""Counts what a run has shown: how long streams paused, and everything that should not have happened."""

from __future__ import annotations

import statistics
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools.chaos.processes import KILLED, deaths
from tools.chaos.streams import MOST_CHARACTERS, Outcomes
from tools.chaos.strikes import HANG, KINDS, REPLICA, Strike
from tools.service import Service

# Tokens that come so soon after a strike were on their way already.
IN_TRANSIT_SECONDS = 0.05
_ERRORS = ("Traceback", "Fatal", "Task exception was never retrieved", "ERROR")
_OF_HANGS = ("scheduler.workers.watchdog", "scheduler.workers.attach")


def recovery_times(strikes: Sequence[Strike], arrivals: Sequence[array[float]]) -> dict[str, Any]:
    """Seconds from a strike until every stream has gained a token again, by kind.

    `alone` are strikes that came when all had recovered from the one before, and in whose recovery no other
    fell; `all` measures every strike, whatever else happened meanwhile.
    """
    times = [(strike, _recovered(strike.at, arrivals)) for strike in strikes]
    report = {}
    for kind in KINDS:
        every = [
            (strike, seconds) for strike, seconds in times if strike.kind == kind and seconds is not None
        ]
        alone = [seconds for strike, seconds in every if _is_alone(strike, seconds, times)]
        report[kind] = {"alone": _summary(alone), "all": _summary([seconds for _, seconds in every])}
    return report


def _recovered(at: float, arrivals: Sequence[array[float]]) -> float | None:
    """None if a stream had nothing left to gain, because the run was about to end."""
    firsts = []
    for times in arrivals:
        index = bisect_right(times, at + IN_TRANSIT_SECONDS)
        if index == len(times):
            return None
        firsts.append(times[index])
    return max(firsts) - at


def _is_alone(strike: Strike, seconds: float, times: Sequence[tuple[Strike, float | None]]) -> bool:
    return not any(
        other is not strike
        and (other.at <= strike.at + seconds)
        and (theirs is None or other.at + theirs >= strike.at)
        for other, theirs in times
    )


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {"count": 0}
    return {
        "count": len(seconds),
        "median_s": round(statistics.median(seconds), 2),
        "worst_s": round(max(seconds), 2),
    }


def unexpected_deaths(service: Service, strikes: Counter[str]) -> list[str]:
    """Deaths that no strike explains, and strikes that nobody died of."""
    wanted = {
        "engine-worker": strikes["engine-worker"] + strikes[HANG],
        "scheduler": strikes["scheduler"],
        "frontend": strikes["frontend"],
    }
    # Each process of a replica is a strike of its own.
    for role in ("scheduler", "engine-worker"):
        wanted[role] += strikes[REPLICA] // 2
    found = deaths(service)
    killed = {role: found.pop((role, KILLED), 0) for role in wanted}
    wrong = [f"{role}: {how}, {count} times" for (role, how), count in found.items()]
    wrong += [
        f"{role}: {killed[role]} deaths by SIGKILL after {count} strikes"
        for role, count in wanted.items()
        if killed[role] != count
    ]
    return wrong


def quarantined(service: Service) -> list[str]:
    """Lines of the log that name a request as the one at fault."""
    return [line[:MOST_CHARACTERS] for line in service.log.splitlines() if "is quarantined" in line]


def errors_in_the_log(service: Service) -> list[str]:
    """Lines that tell of errors, but for what is said of workers that hang."""
    return [
        line[:MOST_CHARACTERS]
        for line in service.log.splitlines()
        if any(mark in line for mark in _ERRORS) and not any(mark in line for mark in _OF_HANGS)
    ]


def counts(outcomes: Outcomes, strikes: Counter[str]) -> dict[str, Any]:
    """The counts that are to be told whatever they are."""
    return {
        "answered": dict(outcomes.answered),
        "tokens_compared": outcomes.tokens,
        "strikes": {kind: strikes[kind] for kind in KINDS},
        "made_again_after_their_frontend_was_killed": dict(outcomes.broken),
        "connections_refused_while_no_frontend_ran": outcomes.unreachable,
    }
