"""The replicas of a service on one machine: their names, and which processors and GPUs each has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import ConfigError

MAX_REPLICAS = 64
_DEVICES = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Replica:
    """One of `count` replicas. With a single one, processes and sockets have no number in their names."""

    number: int
    count: int

    def name(self, process: str) -> str:
        """What the replica's process is called, such as scheduler-1."""
        return process if self.count == 1 else f"{process}-{self.number}"

    @property
    def scheduler_socket(self) -> str:
        """The file name of its scheduler's socket."""
        return f"{self.name('scheduler')}.sock"

    @property
    def worker_socket(self) -> str:
        """The file name of the control socket of its first worker."""
        return f"{self.name('worker')}.sock"

    def listen(self, address: str) -> tuple[str, ...]:
        """Where its scheduler listens for frontends elsewhere: the number is added to the port of HOST:PORT.

        Raises:
            ConfigError: that is no address.
        """
        if not address:
            return ()
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) + self.number < 2**16:
            raise ConfigError(
                f"scheduler_listen is {address!r}; it must be HOST:PORT", param="scheduler_listen"
            )
        return (f"{host}:{int(port) + self.number}",)

    def environment(self, device: str, world_size: int = 1) -> Mapping[str, str]:
        """What its workers' environment says of the processors and GPUs that they may use.

        Args:
            device: as in `WorkerConfig.device`; if it names a GPU, all replicas share that.
            world_size: how many workers share the model, each with a GPU of its own.

        Raises:
            ConfigError: there are GPUs, but too few.
        """
        if self.count == 1:
            return {}
        more = {}
        if _THREADS not in os.environ:
            more[_THREADS] = str(max(1, len(os.sched_getaffinity(0)) // (self.count * world_size)))
        gpus = _gpus()
        if device in ("auto", "cuda") and gpus:
            if len(gpus) < self.count * world_size:
                raise ConfigError(
                    f"data_parallel_size is {self.count} with {world_size} GPUs for each replica, but there "
                    f"are {len(gpus)}; with --device cuda:N all share one",
                    param="data_parallel_size",
                )
            more[_DEVICES] = ",".join(gpus[self.number * world_size : (self.number + 1) * world_size])
        return more


def replicas(count: int) -> list[Replica]:
    """All of a service's replicas."""
    return [Replica(number, count) for number in range(count)]


def check_data_parallel_size(count: int) -> None:
    """Raises ConfigError for a number of replicas that cannot be."""
    if not 1 <= count <= MAX_REPLICAS:
        raise ConfigError(
            f"data_parallel_size is {count}; it must be 1 to {MAX_REPLICAS}", param="data_parallel_size"
        )


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get(_DEVICES)
    if visible is not None:
        return [each for each in visible.split(",") if each.strip()]
    devices = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [str(number) for number in range(sum(name.isdecimal() for name in devices))]
