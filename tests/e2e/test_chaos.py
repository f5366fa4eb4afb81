"""Every process is killed several times under streams, by itself and together with another one. `make chaos`
does so at random and for longer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tools.chaos.run import chaos, faults, start
from tools.chaos.strikes import HANG, Strikes

NUM_STREAMS = 16
PAUSE_SECONDS = 0.7
STRIKES = (
    ("engine-worker",),
    ("scheduler",),
    ("frontend",),
    (HANG, "scheduler"),
    ("frontend", "engine-worker"),
    ("scheduler", "frontend"),
)


@pytest.mark.slow  # test_deaths.py kills each kind of process once
@pytest.mark.timeout(120)
async def test_streams_get_every_token_once_whatever_is_killed(tmp_path: Path, smollm2_dir: Path) -> None:
    async def disturb(strikes: Strikes) -> None:
        for kinds in STRIKES:
            await strikes.strike_each(kinds)
            await asyncio.sleep(PAUSE_SECONDS)

    service = start(tmp_path, "null", NUM_STREAMS, step_timeout=0.5)
    try:
        results = await chaos(service, disturb, num_streams=NUM_STREAMS, seed=6, greedy=False)
    finally:
        status = service.stop()
    assert faults(results) == {}
    assert status == 0
    assert results["strikes"] == {"engine-worker": 2, "scheduler": 3, "frontend": 3, HANG: 1}
    assert sum(results["answered"].values()) >= NUM_STREAMS
    assert sum(results["made_again_after_their_frontend_was_killed"].values()) > 0
