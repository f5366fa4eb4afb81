"""What runs on a Ray cluster: which processes, configured how, on which resources. No Ray in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import WorkerConfig
from frontend.config import FrontendConfig
from pagewire.base.errors import ConfigError
from pagewire.base.options import build
from pagewire.cli.replicas import check_data_parallel_size
from pagewire.hub.names.model_name import default_model_name
from pagewire.supervisor import ranks_of
from scheduler.config import SchedulerConfig

# A directory of this name under the temporary one of the node that a replica is on has its sockets.
SOCKETS = "pagewire-ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayService:
    """A service by its name on a cluster.

    Attributes:
        name: of the service; its actors' names begin with it.
        worker, scheduler, frontend: configurations, whose sockets and addresses the nodes fill in.
        data_parallel_size: replicas.
        frontends: frontend processes.
        cpus_per_rank: processors that Ray reserves for each rank.
    """

    name: str
    worker: WorkerConfig
    scheduler: SchedulerConfig
    frontend: FrontendConfig
    data_parallel_size: int
    frontends: int
    cpus_per_rank: float

    @classmethod
    def resolve(
        cls,
        model: str,
        values: dict[str, Any],
        *,
        name: str,
        data_parallel_size: int,
        frontends: int,
        cpus_per_rank: float,
    ) -> RayService:
        """From option values. The model is resolved on each node.

        Raises:
            ConfigError: an option is wrong.
        """
        if not name or not all(character.isalnum() or character in "-_" for character in name):
            raise ConfigError(f"name is {name!r}; it must be letters, digits, - and _", param="name")
        if frontends < 1:
            raise ConfigError(f"frontends is {frontends}; it must be at least 1", param="frontends")
        check_data_parallel_size(data_parallel_size)
        names = values.get("served_model_names") or (default_model_name(model),)
        values = {**values, "model": model, "served_model_names": names}
        socket = Path(SOCKETS)
        shown = {
            f"scheduler_{each}": values.get(each) for each in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
        }
        return cls(
            name=name,
            worker=build(WorkerConfig, {**values, "socket": socket}),
            scheduler=build(SchedulerConfig, {**values, "listen": ("unix:s",), "worker_socket": socket}),
            frontend=build(FrontendConfig, {**values, **shown, "scheduler": "file:/"}),
            data_parallel_size=data_parallel_size,
            frontends=frontends,
            cpus_per_rank=cpus_per_rank,
        )

    @property
    def gpus_per_rank(self) -> int:
        """1, or 0 for ranks on processors: what runs where there is no GPU is asked for as such."""
        return 0 if self.worker.device == "cpu" or self.worker.engine == "null" else 1

    def bundles(self) -> list[dict[str, float]]:
        """The resources of one replica: its scheduler's, then each rank's."""
        rank = {"CPU": self.cpus_per_rank, "GPU": float(self.gpus_per_rank)}
        ranks = [{kind: amount for kind, amount in rank.items() if amount}] * self.worker.world_size
        return [{"CPU": 1.0}, *ranks]

    def directory(self, replica: int, parent: Path) -> Path:
        """Where the sockets of a replica are on its node."""
        return parent / f"{SOCKETS}-{self.name}-{replica}"

    def scheduler_of(self, replica: int, directory: Path, listen: str) -> SchedulerConfig:
        """A replica's scheduler, which also takes frontends at `listen`, HOST:PORT."""
        return replace(
            self.scheduler,
            listen=(f"unix:{directory / 'scheduler.sock'}", listen),
            worker_socket=directory / "worker.sock",
            data_parallel_rank=replica,
        )

    def rank_of(self, rank: int, directory: Path, gpu: str) -> WorkerConfig:
        """A rank of a replica, on the GPU that Ray gave it, if any."""
        config = list(ranks_of(replace(self.worker, socket=directory / "worker.sock")).values())[rank]
        return replace(config, device=f"cuda:{gpu}") if gpu else config
