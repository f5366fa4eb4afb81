"""A service on a Ray cluster of several nodes, all on this machine: placed, found, put back when it dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pagewire.base.errors import ConfigError
from pagewire.on_ray.plan import RayService
from tools.service import free_ports

MAX_TOKENS = 150


def resolved(**options: object) -> RayService:
    settings = {"data_parallel_size": 2, "frontends": 1, "cpus_per_rank": 1.0, "name": "test"}
    values = {name: options.pop(name) for name in list(options) if name not in settings}
    return RayService.resolve("smollm2-135m", values, **{**settings, **options})  # type: ignore[arg-type]


def test_a_replica_asks_for_its_scheduler_and_its_ranks() -> None:
    assert resolved(device="cpu", tensor_parallel_size=2).bundles() == [
        {"CPU": 1.0},
        {"CPU": 1.0},
        {"CPU": 1.0},
    ]
    assert resolved(tensor_parallel_size=2, cpus_per_rank=0.0).bundles() == [
        {"CPU": 1.0},
        {"GPU": 1.0},
        {"GPU": 1.0},
    ]
    assert resolved(engine="null").gpus_per_rank == 0


def test_ranks_of_a_replica_meet_beside_each_other() -> None:
    service = resolved(tensor_parallel_size=2)
    directory = service.directory(1, Path("/tmp"))
    scheduler = service.scheduler_of(1, directory, "host:1")
    ranks = [service.rank_of(rank, directory, gpu) for rank, gpu in enumerate(("3", "5"))]
    assert {rank.socket for rank in ranks} == {scheduler.worker_socket}
    assert [(rank.rank, rank.device) for rank in ranks] == [(0, "cuda:3"), (1, "cuda:5")]
    assert scheduler.listen == (f"unix:{directory}/scheduler.sock", "host:1")
    assert scheduler.data_parallel_rank == 1


@pytest.mark.parametrize("options", [{"name": "a b"}, {"frontends": 0}, {"data_parallel_size": 0}])
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        resolved(**options)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[object, str]]:
    """A cluster of three nodes, and the HTTP API of a service with two replicas on it."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    import ray
    from ray.cluster_utils import Cluster

    from pagewire.on_ray import cluster as on_ray

    node = {"num_cpus": 2, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        nodes.add_node(**node)
    on_ray.connect(nodes.address)
    port, grpc_port = free_ports(2)
    service = resolved(engine="null", null_step_ms=20.0, port=port, grpc_port=grpc_port)
    try:
        (http,) = on_ray.up(service, timeout=120)
        yield nodes, http
        on_ray.down("test")
    finally:
        ray.shutdown()
        nodes.shutdown()
        monkeypatch.undo()


def ask(http: str, seed: int) -> list[int]:
    body = {
        "prompt": [400 + seed, 500],
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"http://{http}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def until_healthy(http: str, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        health = httpx.get(f"http://{http}/health").json()
        if health["healthy"] >= count:
            return
        time.sleep(0.3)
    raise AssertionError(health)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_streams_go_on_when_actors_and_a_node_die_and_these_are_replaced(address: tuple[object, str]) -> None:
    import ray

    from pagewire.on_ray import cluster as on_ray

    nodes, http = address
    states = on_ray.status("test")
    assert all(state["ready"] for state in states.values())
    homes = {name: state["node_id"] for name, state in states.items()}
    for replica in (0, 1):
        assert homes[f"test-scheduler-{replica}"] == homes[f"test-rank-{replica}-0"], "they share memory"
    assert homes["test-scheduler-0"] != homes["test-scheduler-1"], "there is room for one on a node"
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda seed: ask(http, seed), range(8)))

        def under_streams(strike: str) -> None:
            asking = [pool.submit(ask, http, seed) for seed in range(8)]
            time.sleep(0.7)
            ray.kill(on_ray.actors_of("test")[strike], no_restart=False)
            assert [each.result() for each in asking] == expected, strike
            until_healthy(http, 2)

        under_streams("test-scheduler-0")
        under_streams("test-rank-1-0")
        spare = nodes.add_node(num_cpus=2, include_dashboard=False)  # type: ignore[attr-defined]
        asking = [pool.submit(ask, http, seed) for seed in range(8)]
        time.sleep(0.7)
        frontend_home = on_ray.status("test")["test-frontend-0"]["node_id"]
        lost = next(
            node
            for node in nodes.worker_nodes  # type: ignore[attr-defined]
            if node.node_id in homes.values() and node.node_id != frontend_home and node is not spare
        )
        nodes.remove_node(lost, allow_graceful=False)  # type: ignore[attr-defined]
        assert [each.result() for each in asking] == expected, "a node"
        until_healthy(http, 2)


@pytest.mark.slow
def test_a_service_too_large_for_any_node_says_so(
    address: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagewire.on_ray import cluster as on_ray

    monkeypatch.setattr(on_ray, "PLACE_SECONDS", 2.0)
    with pytest.raises(ConfigError, match="no node of the cluster has room"):
        on_ray.up(resolved(name="large", engine="null", cpus_per_rank=64.0), timeout=5)
    with pytest.raises(ConfigError, match="runs on this cluster"):
        on_ray.up(resolved(engine="null"), timeout=5)
