"""Brings a service up on a Ray cluster, says how it is, and takes it down."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pagewire.base.errors import ConfigError, Unavailable
from pagewire.on_ray import actors as actor_classes
from pagewire.on_ray.plan import RayService

_CLASSES: Any = actor_classes  # ray.remote makes other things of them than their types say
NAMESPACE = "pagewire"
PLACE_SECONDS = 30.0
_LOOK_AGAIN = 0.5
# Ray would hide the other GPUs of a group from a rank, which reaches its peers' memory by their numbers.
_SEE_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


def connect(address: str) -> None:
    """Connects to a cluster, unless this process is connected.

    Raises:
        Unavailable: there is none.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(f"no Ray cluster can be reached at {address!r}: {error}") from error


def up(service: RayService, timeout: float) -> list[str]:
    """Starts a service and waits until requests are served.

    Returns:
        HOST:PORT of each frontend's HTTP API.

    Raises:
        ConfigError: a service of this name runs, the cluster has no room for it, or a process refuses its
            settings.
        Unavailable: it was not ready in time. What was started stays.
    """
    if actors_of(service.name):
        raise ConfigError(f"a service {service.name!r} runs on this cluster; take it down, or give --name")
    groups = [_placed(service, replica) for replica in range(service.data_parallel_size)]
    actors: dict[str, Any] = {}
    for replica, group in enumerate(groups):
        name = f"{service.name}-scheduler-{replica}"
        actors[name] = _CLASSES.SchedulerActor.options(**_options(name, group, 0)).remote(service, replica)
        for rank in range(service.worker.world_size):
            name = f"{service.name}-rank-{replica}-{rank}"
            options = _options(name, group, 1 + rank)
            options |= {"num_cpus": service.cpus_per_rank, "num_gpus": service.gpus_per_rank}
            if service.gpus_per_rank:
                options["runtime_env"] = _SEE_ALL_GPUS
            actors[name] = _CLASSES.RankActor.options(**options).remote(service, replica, rank)
    frontends = []
    for number in range(service.frontends):
        name = f"{service.name}-frontend-{number}"
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "scheduling_strategy": "SPREAD",
        }
        actors[name] = _CLASSES.FrontendActor.options(**options).remote(service, number, NAMESPACE)
        frontends.append(actors[name])
    return _until_serving(actors, frontends, time.monotonic() + timeout)


def _placed(service: RayService, replica: int) -> PlacementGroup:
    """Room for a replica, all on one node: its ranks and its scheduler share memory."""
    group = placement_group(
        service.bundles(), strategy="STRICT_PACK", name=f"{service.name}-{replica}", lifetime="detached"
    )
    if not group.wait(PLACE_SECONDS):
        down(service.name)
        raise ConfigError(
            f"no node of the cluster has room for replica {replica}, which needs {service.bundles()} on one "
            f"node; free in all is {ray.available_resources()}"
        )
    return group


def _options(name: str, group: PlacementGroup, bundle: int) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    }


def _until_serving(actors: dict[str, Any], frontends: list[Any], deadline: float) -> list[str]:
    while time.monotonic() < deadline:
        for name, state in zip(
            actors, ray.get([actor.state.remote() for actor in actors.values()]), strict=True
        ):
            if state["error"]:
                raise ConfigError(f"{name}: {state['error']}")
        addresses: list[str] = ray.get([actor.address.remote() for actor in frontends])
        if all(map(_is_ready, addresses)):
            return addresses
        time.sleep(_LOOK_AGAIN)
    raise Unavailable("the service was not ready in time; 'pagewire ray status' says what is missing")


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as response:  # nosec B310 # http only
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def actors_of(name: str) -> dict[str, Any]:
    """The actors of a service, by name."""
    found = {}
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE and each["name"].startswith(f"{name}-"):
            found[each["name"]] = ray.get_actor(each["name"], NAMESPACE)
    return dict(sorted(found.items()))


def status(name: str) -> dict[str, dict[str, Any]]:
    """What each actor says of its process; of one that does not answer, why."""
    said: dict[str, dict[str, Any]] = {}
    for actor_name, actor in actors_of(name).items():
        try:
            said[actor_name] = ray.get(actor.state.remote(), timeout=5)
        except ray.exceptions.RayError as error:
            said[actor_name] = {"pid": None, "ready": False, "error": str(error).splitlines()[0], "node": ""}
    return said


def down(name: str) -> int:
    """Stops a service's processes, frontends first, and gives back its room; how many actors there were."""
    actors = actors_of(name)
    order = ("frontend", "scheduler", "rank")
    for role in order:
        stopping = [
            actor.stop.remote() for each, actor in actors.items() if each.startswith(f"{name}-{role}-")
        ]
        ray.wait(stopping, num_returns=len(stopping), timeout=60) if stopping else None
    for actor in actors.values():
        ray.kill(actor)
    for each in placement_group_table().values():
        if each["name"].rpartition("-")[0] == name and each["state"] != "REMOVED":
            remove_placement_group(ray.util.get_placement_group(each["name"]))
    return len(actors)
