"""One run: what is answered when nothing happens, then strikes under streams, then what is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.chaos import remains, verdict
from tools.chaos.processes import living
from tools.chaos.streams import Streams, difference, draw_asks, undisturbed
from tools.chaos.strikes import Strikes
from tools.fuzz_service import start_service
from tools.service import Service

NUM_FRONTENDS = 2
STEP_TIMEOUT = 2.0
LONGEST = 120
WATCH_SECONDS = 1.0


def start(
    directory: Path,
    engine: str,
    num_streams: int,
    step_timeout: float = STEP_TIMEOUT,
    replicas: int = 1,
    ranks: tuple[int, int] = (1, 1),
) -> Service:
    """A service of an engine: "tiny", "null", or a model's name. The caller stops it. `ranks` are those of a
    pipeline stage, and the stages.
    """
    options = ("--frontends", str(NUM_FRONTENDS), "--step-timeout", str(step_timeout))
    options += ("-dp", str(replicas), "-tp", str(ranks[0]), "-pp", str(ranks[1]))
    options += ("--max-model-len", "512", "--max-num-seqs", str(num_streams))
    if engine == "tiny":
        # With its embeddings as its head a model of random weights says the same token for ever.
        return start_service(directory, *options, tie_word_embeddings=False)
    if engine == "null":
        return Service(directory, options=(*options, "--engine", "null", "--null-step-ms", "20")).wait_ready()
    return Service(directory, model=engine, options=options).wait_ready()


async def chaos(
    service: Service,
    disturb: Callable[[Strikes], Awaitable[None]],
    *,
    num_streams: int,
    seed: int,
    greedy: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Counts of everything; "faults" is what should not have happened.

    Args:
        service: of `start`.
        disturb: strikes as it likes; streams end when it returns.
        num_streams: at a time.
        seed: of what is asked and what is struck.
        greedy: whether half of the requests have no seed; for the null engine such text is new every time.
        say: told of every strike.
    """
    asks = draw_asks(2 * num_streams, LONGEST, seed, greedy=greedy)
    expected = await undisturbed(service, asks, num_streams)
    # In other batches, where sums round differently. The null engine computes nothing.
    again = await undisturbed(service, asks[::-1], num_streams) if greedy else expected
    num_processes = len(living(service))
    before = await remains.at_rest(service, num_processes)
    descendants = remains.Descendants(service)
    strikes = Strikes(service, seed, say)
    streams = Streams(
        service, expected, num_streams, frontend_killed_at=strikes.frontend_killed_at, seed=seed
    )
    began = time.monotonic()
    watching = asyncio.create_task(descendants.watch(WATCH_SECONDS))
    streaming = asyncio.create_task(streams.run())
    await disturb(strikes)
    streams.stop()
    await streaming
    elapsed = time.monotonic() - began
    after = await remains.at_rest(service, num_processes)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    differ = [difference(again[ask], expected[ask]) for ask in asks if expected[ask] != again[ask]]
    return {
        "seconds": round(elapsed, 1),
        **verdict.counts(streams.outcomes, strikes.counts),
        "recovery": verdict.recovery_times(strikes.done, streams.arrivals),
        "faults": {
            "failed_requests": dict(streams.outcomes.failures),
            "answers_with_other_tokens": streams.outcomes.differences,
            "answers_that_differ_without_strikes": differ,
            "quarantined": verdict.quarantined(service),
            "unexpected_deaths": verdict.unexpected_deaths(service, strikes.counts),
            "errors_in_the_log": verdict.errors_in_the_log(service),
            **{f"left_{kind}": found for kind, found in remains.left_behind(before, after).items()},
            "left_orphans": descendants.orphans(),
        },
        "descriptors_before": before.descriptors,
        "descriptors_after": after.descriptors,
    }


def faults(results: dict[str, Any]) -> dict[str, Any]:
    """What should not have happened and did, by kind."""
    return {kind: found for kind, found in results["faults"].items() if found}
