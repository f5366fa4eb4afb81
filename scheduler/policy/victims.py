"""Whose row is taken, when rows or memory are short."""

from __future__ import annotations

from collections.abc import Container, Sequence

from scheduler.blocks.pool import BlockPool
from scheduler.policy.shares import Shares
from scheduler.request import Request


def for_memory(running: Sequence[Request], shares: Shares, untouchable: Container[Request]) -> Request | None:
    """Who makes room when a running request finds no block: the last in order of service or, if another
    client holds many more rows than its own, that client's last. None if all of those must stay.

    Args:
        running: in order of service.
        shares: what clients hold.
        untouchable: requests that the step computes already.
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
    """Who makes room for the first waiting request: the last requests of the client with the most rows, if it
    has many more than the newcomer's and would still have no fewer. Nobody, if that would not do. Who has
    gained no token since it took its row stays, so that clients that take rows from each other all go on.

    Args:
        newcomer: the request.
        running: in order of service.
        shares: what clients hold.
        pool: blocks.
        num_lacking: blocks that are short; if none are, it is a row.
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
        num_lacking -= sum(pool.ref_count(block_id) == 1 for block_id in request.block_ids)
        if num_lacking <= 0:
            return victims if len(victims) <= shares.surplus(rich, newcomer.share) else []
    return []
