"""The load generator over gRPC, against a server whose times and faults are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from pagewire.base.errors import ConfigError, Unavailable
from pagewire.bench.serve.datasets import RandomDataset
from pagewire.bench.serve.generator import Generator, SpreadGenerator
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.metrics import Objectives
from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.serve.sweep import Sweep
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths
from tests.integration.grpc_stream_server import Behaviour, GrpcStreamServer
from tools.service import free_ports

FIRST, GAP, TOKENS = 0.06, 0.02, 6


def measure(url: str, load: Load, processes: int = 1, **target: Any) -> dict[str, Any]:
    """The result of one point."""
    results: list[dict[str, Any]] = []
    dataset = RandomDataset(maker=PromptMaker(), input=Lengths(5, 5), output=Lengths(TOKENS, TOKENS))
    sweep = Sweep(dataset=dataset, loads=[load], warmup=0, objectives=Objectives({}), save_requests=True)
    about = Target(url=url, **{"model": "m", **target})
    with SpreadGenerator(about, processes) if processes > 1 else Generator(about) as generator:
        assert not sweep.run(generator, results.append)
    return results[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_times_are_those_of_the_server(processes: int) -> None:
    with GrpcStreamServer(first=FIRST, gap=GAP) as server:
        result = measure(server.url, Load(concurrency=4, num_requests=12), processes)
    assert result["requests"] == {"sent": 12, "complete": 12, "failed": 0, "unfinished": 0, "resent": 0}
    assert (result["output_tokens"], result["outputs"], result["input_tokens"]) == (12 * 6, 12 * 6, 12 * 5)
    assert result["finish_reasons"] == {"length": 12}
    expected = {"ttft": FIRST, "itl": GAP, "tpot": GAP, "e2e": FIRST + (TOKENS - 1) * GAP}
    for name, seconds in expected.items():
        # a sleep is never shorter than told, and on a busy machine longer; the median has most of it
        assert 0.95 * seconds < result[f"{name}_ms"]["p50"] / 1000 < 2 * seconds + 0.05
    assert result["client"]["processes"] == processes


def test_requests_take_turns_over_connections_and_bring_their_headers() -> None:
    with GrpcStreamServer() as server:
        headers = (("Authorization", "Bearer s3cret"),)
        measure(server.url, Load(concurrency=1, num_requests=9), connections=3, headers=headers)
    assert len(server.requests) == 9
    assert [server.peers.count(peer) for peer in set(server.peers)] == [3, 3, 3]
    assert {said["authorization"] for said in server.metadata} == {"Bearer s3cret"}
    [sampling] = {request.sampling.SerializeToString() for request in server.requests}
    assert server.requests[0].sampling.max_tokens == TOKENS, sampling
    assert {request.model for request in server.requests} == {"m"}


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("refuse", "gRPC RESOURCE_EXHAUSTED: the queue is full"),
        ("cancel", "gRPC CANCELLED: nobody wants it"),
        ("break off", "the stream ended without a finished event"),
        ("hang", "timeout: no end after 0.3 s"),
    ],
)
def test_failures_are_told_by_kind(behaviour: Behaviour, error: str) -> None:
    with GrpcStreamServer(behaviour=behaviour) as server:
        result = measure(server.url, Load(concurrency=2, num_requests=6), timeout=0.3)
    assert result["errors"] == {error: 6}
    assert (result["requests"]["failed"], result["ttft_ms"]) == (6, None)


def test_a_server_that_is_not_there() -> None:
    [port] = free_ports(1)
    for processes in (1, 2):
        with pytest.raises(Unavailable, match=f"grpc://127.0.0.1:{port}: cannot connect: .*refused"):
            measure(f"grpc://127.0.0.1:{port}", Load(num_requests=1), processes)


def test_the_first_model_is_taken_and_a_server_without_any_is_told_of() -> None:
    with GrpcStreamServer() as server, Generator(Target(url=server.url)) as generator:
        assert generator.first_model() == "first"
    with GrpcStreamServer(behaviour="no models") as server, Generator(Target(url=server.url)) as generator:
        with pytest.raises(ConfigError, match="lists no models"):
            generator.first_model()


def pem(path: Path, issued: trustme.LeafCert) -> Path:
    path.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    return path


def test_tls_is_verified_unless_told_otherwise(tmp_path: Path) -> None:
    authority = trustme.CA()
    authorities = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(authorities))
    load = Load(num_requests=3)
    with GrpcStreamServer(certificate=pem(tmp_path / "1", authority.issue_cert("127.0.0.1"))) as server:
        for trust in ({"ca_file": authorities}, {"insecure": True}):
            assert measure(server.url, load, **trust)["requests"]["complete"] == 3
        with pytest.raises(Unavailable, match="cannot connect"):
            measure(server.url, load, timeout=5)
        with pytest.raises(ConfigError, match="no certificates can be read"):
            measure(server.url, load, ca_file=tmp_path / "missing")
    with GrpcStreamServer(certificate=pem(tmp_path / "2", authority.issue_cert("*.other.org"))) as server:
        assert measure(server.url, load, insecure=True)["requests"]["complete"] == 3
        with pytest.raises(Unavailable, match="cannot connect"):
            measure(server.url, load, ca_file=authorities, timeout=5)
