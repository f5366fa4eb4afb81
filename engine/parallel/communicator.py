"""What the ranks of a group send each other while they compute.

The ranks meet again whenever their scheduler attaches, each time in new process groups: the death of one
takes the groups with it, and the others keep their weights for the next ones.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.exchange import PeerExchange
from engine.parallel.sockets import connections, open_sockets, shut_down
from engine.parallel.watch import Watch
from pagewire.base.exit_status import DEVICE_LOST

# Untyped: torch's own annotations leave out what is used of it here.
_c10d: Any = dist

logger = logging.getLogger(__name__)

# How long a rank waits for the others at a meeting.
JOIN_SECONDS = 30.0
# How long gloo waits for another rank: for ever, as it were. The scheduler knows better who hangs.
OPERATION_SECONDS = 3600.0
# How long a library may take to let go of a group that is lost. NCCL may spin for ever where a device hangs.
LEAVE_SECONDS = 20.0
# What is sent is kept until it has left, and no more of it than this.
_MOST_SENT = 8


class Communicator:
    """This rank's way to the others: those that share its layers, and its like in other pipeline stages.
    Outside of a meeting, as while a worker measures how much memory its steps take, a rank is alone: sums are
    its own, what is gathered is its own part repeated, and what it would receive stays as it is.

    Used by one thread; another one breaks what it waits for once the scheduler is gone.

    Args:
        rank, size: its place among all ranks, and how many there are.
        device: where the tensors are. gloo serves CPUs, NCCL GPUs.
        tensor_parallel_size: ranks of a stage, which are neighbours.
        peers: a faster way for small tensors; None where there is none.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        tensor_parallel_size: int | None = None,
        peers: PeerExchange | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        # Ranks of this one's stage, and its place among them.
        self.stage_size = tensor_parallel_size or size
        self.stage, self.stage_rank = divmod(rank, self.stage_size)
        self.num_stages = size // self.stage_size
        self._device = device
        self._peers = peers if self.stage_size > 1 else None
        self._is_met = self._uses_peers = False
        # Of the ranks of this stage; of all ranks, for tensors on the device; of all, for those on the host.
        self._group: Any = None
        self._world: Any = None
        self._host: Any = None
        self._store: Any = None
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        self._connections: list[Any] = []
        self._watch: Watch | None = None

    def join(self, rendezvous: str) -> None:
        """Meets the others, who come to the same file, which is new for each meeting.

        Raises:
            OSError: not all of them came within JOIN_SECONDS.
        """
        self.leave()
        store = _c10d.FileStore(rendezvous, self.size)
        store.set_timeout(timedelta(seconds=JOIN_SECONDS))
        try:
            if self.num_stages > 1:
                self._host = self._over_gloo(_c10d.PrefixStore("host", store), self.rank, self.size)
            if self._device.type == "cuda":
                self._meet_on_gpus(store)
            else:
                self._world = self._host
                if self.stage_size > 1:
                    stage = _c10d.PrefixStore(f"stage {self.stage}", store)
                    self._group = self._over_gloo(stage, self.stage_rank, self.stage_size)
            self._is_met = True
            self._store = store
            self._try()
            _barrier(store, "ready", self.rank, self.size)
        except RuntimeError as error:
            self.leave()
            raise OSError(f"rank {self.rank} did not meet the others: {error}") from error
        except OSError:
            self.leave()
            raise
        logger.info("rank %d has met the other %d", self.rank, self.size - 1)

    def _over_gloo(self, store: Any, rank: int, size: int) -> Any:
        options = _c10d.ProcessGroupGloo._Options()
        # All ranks are on this host, and nobody else is to reach them.
        options._devices = [_c10d.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        before = open_sockets()
        group = _c10d.ProcessGroupGloo(store, rank, size, options)
        self._connections += connections(open_sockets() - before)
        if hasattr(group, "_set_default_timeout"):  # as newer releases of torch have it
            group._set_default_timeout(timedelta(seconds=OPERATION_SECONDS))
        return group

    def _meet_on_gpus(self, store: Any) -> None:
        torch.cuda.set_device(self._device)
        stage = _c10d.PrefixStore(f"stage {self.stage}", store)
        shares_device = False
        if self._peers is not None:
            shares_device = self._reach_peers(self._peers, stage)
        if self.stage_size > 1 and not shares_device:
            self._group = _c10d.ProcessGroupNCCL(stage, self.stage_rank, self.stage_size)
        if self.num_stages > 1:
            world = _c10d.PrefixStore("world", store)
            self._world = _c10d.ProcessGroupNCCL(world, self.rank, self.size)

    def _reach_peers(self, peers: PeerExchange, stage: Any) -> bool:
        """Opens the way over the others' memory where all of this stage can. Returns whether some of them
        share a GPU, as in tests: there is no other way then.
        """
        rank, everybody = self.stage_rank, range(self.stage_size)
        stage.set(f"address {rank}", peers.address().hex())
        stage.set(f"device {rank}", peers.device_id)
        # Nobody writes to anybody's memory any more once all have come here: each has ended what it launched.
        addresses = [bytes.fromhex(stage.get(f"address {other}").decode()) for other in everybody]
        devices = [stage.get(f"device {other}").decode() for other in everybody]
        shares_device = len(set(devices)) < self.stage_size
        outcome = ""
        try:
            peers.open(addresses)
        except OSError as error:
            outcome = str(error)
        stage.set(f"opened {rank}", outcome)
        outcomes = [stage.get(f"opened {other}").decode() for other in everybody]
        self._uses_peers = not any(outcomes)
        if not self._uses_peers:
            if shares_device:
                raise OSError(f"ranks share a GPU and cannot reach each other's memory: {outcomes}")
            logger.warning("all sums go through NCCL: %s", next(filter(None, outcomes)))
        return shares_device

    def _try(self) -> None:
        """Everything once: libraries set connections up when they are first used, and not in a graph."""
        dtypes = (torch.float32,) if self._device.type == "cpu" else (torch.float32, torch.bfloat16)
        for dtype in dtypes:
            small = torch.zeros(8, device=self._device, dtype=dtype)
            if self.stage_size > 1 and (self._group is not None or dtype is torch.bfloat16):
                self.all_reduce(small)
                self.all_gather(small)
        if self._group is not None:
            self._group.allreduce([torch.zeros(8, device=self._device)]).wait()
        if self.stage > 0:
            self.receive(torch.zeros(8, device=self._device))
        if self.stage < self.num_stages - 1:
            self.send(torch.zeros(8, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def texts(self, text: str) -> list[str]:
        """What every rank gives here, in rank order; once in a meeting.

        Raises:
            OSError: another rank is lost.
        """
        try:
            self._store.set(f"text {self.rank}", text)
            return [self._store.get(f"text {rank}").decode() for rank in range(self.size)]
        except RuntimeError as error:
            raise OSError(f"rank {self.rank} did not hear from the others: {error}") from error

    def watch(self, control_fd: int) -> None:
        """From now on, breaks whatever this rank waits for once `control_fd` is readable: the scheduler has
        gone, as it does when any rank is lost.
        """
        self._watch = Watch(control_fd, self._break)

    def _break(self) -> None:
        """Ends every wait for other ranks with an error, though they may live and hang. From any thread. If a
        library does not let go in time, the process ends: nothing else ends a kernel that waits for ever.
        """
        shut_down(self._connections)  # gloo has no way to do this by itself
        if self._device.type != "cuda":
            return
        if self._peers is not None:
            self._peers.stop()
        groups = [each for each in (self._group, self._world) if each is not None]
        if groups:
            done = threading.Event()
            threading.Thread(target=_end_unless, args=(done, "NCCL"), daemon=True).start()
            for group in groups:
                group.abort()
            done.set()

    def leave(self) -> None:
        """Forgets the process groups; the others notice."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        was_met, self._is_met = self._is_met, False
        self._break()
        for connection in self._connections:
            connection.close()
        self._connections = []
        if self._device.type == "cuda" and was_met:
            # What was launched ends now, whatever it waited for.
            done = threading.Event()
            threading.Thread(target=_end_unless, args=(done, "the GPU"), daemon=True).start()
            with suppress(RuntimeError):  # a device that failed says so at the next step
                torch.cuda.synchronize(self._device)
            self._group = self._world = self._host = None
            if self._peers is not None:
                self._peers.close()
            done.set()
        self._sent.clear()
        self._store = None
        self._group = self._world = self._host = None

    @property
    def has_given_up(self) -> bool:
        """Whether the device ended a wait for another rank by itself, so that results mean nothing."""
        return self._peers is not None and self._peers.has_given_up

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of the partial results of the ranks of this stage, in place; the same bytes on every rank.

        Raises:
            RuntimeError: another rank is lost.
        """
        if not self._is_met or self.stage_size == 1:
            return partial
        if self._takes(partial):
            assert self._peers is not None
            return self._peers.all_reduce(partial)
        self._group.allreduce([partial]).wait()
        return partial

    def all_gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """The part of every rank of this stage, in rank order; all of one shape. Every rank gets the same
        bytes.

        Raises:
            RuntimeError: another rank is lost.
        """
        if not self._is_met:
            return [part] * self.stage_size
        if self._takes(part):
            assert self._peers is not None
            return self._peers.all_gather(part)
        parts = [torch.empty_like(part) for _ in range(self.stage_size)]
        self._group.allgather([parts], [part.contiguous()]).wait()
        return parts

    def _takes(self, tensor: torch.Tensor) -> bool:
        peers = self._peers
        return self._uses_peers and peers is not None and peers.takes(tensor, is_only_way=self._group is None)

    def send(self, tensor: torch.Tensor) -> None:
        """Sends a tensor to this rank's like in the next stage. It is not to be changed before it has left;
        on a GPU, before what is launched afterwards.

        Raises:
            RuntimeError: another rank is lost.
        """
        if self._is_met:
            self._keep(self._world.send([tensor], self.rank + self.stage_size, 0), tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        """Fills a tensor with what this rank's like in the stage before sends; raises as `send`."""
        if self._is_met:
            self._world.recv([tensor], self.rank - self.stage_size, 0).wait()

    def return_tokens(self, token_ids: torch.Tensor) -> None:
        """Sends a step's sampled tokens, int64 on the host, to this rank's like in the first stage."""
        if self._is_met:
            self._keep(self._host.send([token_ids], self.stage_rank, 1), token_ids)

    def returned_tokens(self, count: int) -> torch.Tensor:
        """The tokens that the last stage sampled in the oldest step of which they are not here yet, int64
        [count]; waits for them. Raises as `send`.
        """
        token_ids = torch.zeros(count, dtype=torch.int64)
        if self._is_met:
            last = (self.num_stages - 1) * self.stage_size + self.stage_rank
            self._host.recv([token_ids], last, 1).wait()
        return token_ids

    def _keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Waits for what was sent long ago; on a GPU, has what is launched later wait."""
        if tensor.is_cuda:
            work.wait()
            return
        self._sent.append((work, tensor))
        while len(self._sent) > _MOST_SENT or (self._sent and self._sent[0][0].is_completed()):
            self._sent.popleft()[0].wait()


def _barrier(store: Any, name: str, rank: int, size: int) -> None:
    """Waits for all ranks to come here, or raises RuntimeError."""
    store.set(f"{name} {rank}", "")
    store.wait([f"{name} {other}" for other in range(size)])


def _end_unless(done: threading.Event, who: str) -> None:
    """Ends the process if something that must not take long has not ended in time."""
    if not done.wait(LEAVE_SECONDS):
        logger.critical(
            "%s has not let go of a lost group within %g s; this process ends", who, LEAVE_SECONDS
        )
        logging.shutdown()
        os._exit(DEVICE_LOST)
