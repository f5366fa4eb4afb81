"""The workers of one replica: the ranks that share a model, each a process of its own.

A service is a list of replicas, each one scheduler with its group of ranks. This module knows one group:
whoever runs several calls `ranks_of` once for each, with a worker configuration whose `socket`, and whose
`device` where it is a GPU, are that replica's own.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import WorkerConfig


def ranks_of(worker: WorkerConfig, name: str = "engine-worker") -> dict[str, WorkerConfig]:
    """The configuration of each rank of a group, by the name of its process.

    All ranks have one socket path in their configurations, beside which each listens on its own
    (`engine.dispatch.control.rank_socket`), so that a scheduler needs the path alone. The processes are
    independent: each is started, watched and restarted by itself, and its scheduler has the group meet again.

    Args:
        worker: of the group; its `rank` is not looked at. `cuda:N` is the first rank's device, and those
            after it have the GPUs after it; with `cuda` or `auto` the first rank's is the machine's first.
        name: of the process, where the group has one rank; others add their number to it.
    """
    size = worker.world_size
    if size == 1:
        return {name: replace(worker, rank=0)}
    return {
        f"{name}-{rank}": replace(worker, rank=rank, device=_device(worker.device, rank))
        for rank in range(size)
    }


def _device(first: str, rank: int) -> str:
    kind, colon, number = first.partition(":")
    return f"{kind}:{int(number) + rank}" if colon else first
