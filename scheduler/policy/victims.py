"""Chooses which running requests to preempt when rows or blocks are short."""

from __future__ import annotations

from collections.abc import Container, Sequence

from scheduler.blocks.groups import NO_BLOCK
from scheduler.blocks.pool import BlockPool
from scheduler.policy.shares import Shares
from scheduler.request import Request


def for_memory(running: Sequence[Request], shares: Shares, untouchable: Container[Request]) -> Request | None:
    """The request to preempt when a running request needs a block and none is free: the last in order of
    service or, if another client holds many more rows than that one's client, the other client's last. None
    if those are untouchable.

    Args:
        running: running requests in order of service.
        shares: the clients' fairness accounts.
        untouchable: requests that are already in the step.
    """
    last = running[-1]
    assert last.share is not None
    rich = shares.most_running(last.share)
    if rich is not None:
        for request in reversed(running):
            if request.share is rich and request.priority == last.priority:
                if request not in untouchable:
                    return request
                break
    return None if last in untouchable else last


def for_newcomer(
    newcomer: Request, running: Sequence[Request], shares: Shares, pool: BlockPool, num_lacking: int
) -> list[Request]:
    """The requests to preempt for the first waiting request: the last ones of the client with the most rows,
    if it holds many more rows than the newcomer's client and keeps at least as many. Empty if that would not
    free enough. A request that has gained no token since its admission is not preempted, so that clients
    that take rows from each other all make progress.

    Args:
        newcomer: the first waiting request.
        running: running requests in order of service.
        shares: the clients' fairness accounts.
        pool: the block pool.
        num_lacking: blocks that are missing; if 0 or less, a row is missing.
    """
    assert newcomer.share is not None
    rich = shares.most_running(newcomer.share)
    if rich is None:
        return []
    victims: list[Request] = []
    candidates = (each for each in reversed(running) if each.share is rich)
    for request in candidates:
        if request.priority < newcomer.priority or len(request.token_ids) == request.num_tokens_at_entry:
            continue
        victims.append(request)
        num_lacking -= sum(
            pool.ref_count(block_id) == 1 for block_id in request.block_ids if block_id != NO_BLOCK
        )
        if num_lacking <= 0:
            return victims if len(victims) <= shares.surplus(rich, newcomer.share) else []
    return []
