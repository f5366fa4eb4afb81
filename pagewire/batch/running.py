"""Many items answered at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from itertools import islice, takewhile
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_AHEAD = 4
"""In order, this many times the concurrency are begun from the first on that is not answered: a slow one does
not keep the others waiting."""


async def answers(
    items: Iterator[Item],
    answer: Callable[[Item], Awaitable[Answer]],
    *,
    concurrency: int,
    in_order: bool = False,
) -> AsyncGenerator[list[Answer], None]:
    """Answers items, at most `concurrency` at a time, and yields lists of answers as they come. Closing it
    cancels what is under way.

    Args:
        items: read no further than needed.
        answer: answers one.
        concurrency: how many at a time.
        in_order: whether answers come in the order of their items.

    Raises:
        Exception: what `answer` raised; the others are cancelled.
    """
    slots = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> Answer:
        async with slots:
            return await answer(item)

    window = concurrency * (_AHEAD if in_order else 1)
    tasks: list[asyncio.Task[Answer]] = []
    try:
        while True:
            tasks += [asyncio.create_task(one(item)) for item in islice(items, window - len(tasks))]
            if not tasks:
                return
            await asyncio.wait(tasks[:1] if in_order else tasks, return_when=asyncio.FIRST_COMPLETED)
            done = list(takewhile(_is_done, tasks) if in_order else filter(_is_done, tasks))
            together = [task.result() for task in done]  # if one raises, all are still in `tasks`
            taken = set(done)
            tasks = [task for task in tasks if task not in taken]
            yield together
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_done(task: asyncio.Task[Answer]) -> bool:
    return task.done()
