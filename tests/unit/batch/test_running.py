"""Items answered at once: how many, in which order, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing

import pytest

from pagewire.batch.running import answers


async def test_no_more_than_the_concurrency_are_open_and_slow_ones_hold_nobody_up() -> None:
    num_open, most, release = 0, 0, asyncio.Event()

    async def answer(item: int) -> int:
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        await (release.wait() if item == 0 else asyncio.sleep(0))
        num_open -= 1
        return item

    got: list[int] = []
    async for together in answers(iter(range(50)), answer, concurrency=4):
        got += together
        if len(got) == 49:
            assert 0 not in got
            release.set()
    assert (sorted(got), most) == (list(range(50)), 4)


async def test_in_order_answers_wait_for_those_before_them() -> None:
    async def answer(item: int) -> int:
        await asyncio.sleep(0.002 * (item % 5 == 0))
        return item

    come = answers(iter(range(40)), answer, concurrency=3, in_order=True)
    assert [item async for together in come for item in together] == list(range(40))


async def test_errors_that_come_together_are_one_error(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(item: int) -> int:
        raise ValueError(item)

    async with aclosing(answers(iter(range(9)), answer, concurrency=3)) as come:
        with pytest.raises(ValueError, match="0"):
            await anext(come)
    gc.collect()
    assert not caplog.records  # such as "Task exception was never retrieved"


async def test_an_error_or_an_early_end_cancels_what_is_under_way() -> None:
    cancelled: list[int] = []

    async def answer(item: int) -> int:
        if item == 1:
            raise ValueError("one")
        try:
            await asyncio.sleep(60 if item else 0)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    async with aclosing(answers(iter([5, 6, 1]), answer, concurrency=3)) as come:
        with pytest.raises(ValueError, match="one"):
            await anext(come)
    assert sorted(cancelled) == [5, 6]
    cancelled.clear()
    async with aclosing(answers(iter([0, 7]), answer, concurrency=2)) as come:
        assert await anext(come) == [0]
    assert cancelled == [7]
