"""Compares ways to choose a replica for each request, in simulated time, up to 1,000 replicas.

python -m benchmarks.routing --json benchmarks/results/routing.json

For each number of replicas a trace of conversations with shared system prompts, in proportion to the
replicas, goes through each policy: round robin, least loaded, consistent hashing by conversation, and the
longest cached prefix bounded by load, for which the frontends' own code runs. `--trace` takes recorded
requests instead (JSON lines in the form of Mooncake's traces). Hit rate is the share of prompt tokens that
were cached; TTFT is from a request's arrival. Both are of the requests after the first fifth, when caches
have filled.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.simulation import ReplicaSpeed, Simulation
from benchmarks.routing.trace import Conversations, TracedRequest, made_up, recorded

SIZES = (2, 8, 64, 1000)
NUM_FRONTENDS = 4
MOST_REQUESTS = 60_000
LEAST_SECONDS = 16.0


def trace_for(num_replicas: int, arguments: argparse.Namespace) -> list[TracedRequest]:
    """The trace for so many replicas: of so many seconds, or shorter if that were too many requests."""
    rate = arguments.rate * num_replicas
    seconds = min(arguments.seconds, max(LEAST_SECONDS, MOST_REQUESTS / rate))
    kind = Conversations(tenants=max(20, 20 * num_replicas), pause=min(8.0, seconds / 10))
    return made_up(kind, rate, seconds, arguments.seed)


def simulate(trace: list[TracedRequest], num_replicas: int, policies: list[str]) -> dict[str, Any]:
    """The results of each policy."""
    results: dict[str, Any] = {"requests": len(trace), "seconds": round(trace[-1].at, 1)}
    for policy in policies:
        began = time.perf_counter()
        simulation = Simulation(trace, policy, num_replicas, NUM_FRONTENDS, ReplicaSpeed())
        simulation.run()
        results[policy] = simulation.results()
        took = time.perf_counter() - began
        print(f"{num_replicas} replicas, {policy}: {results[policy]}, took {took:.1f} s", file=sys.stderr)
    return results


def main() -> None:
    """Runs all and prints the record."""
    parser = record.parser(__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second for each replica")
    parser.add_argument("--seconds", type=float, default=120.0, help="of simulated time, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="a file of recorded requests")
    arguments = parser.parse_args()
    results = {}
    for num_replicas in arguments.replicas:
        trace = recorded(arguments.trace) if arguments.trace else trace_for(num_replicas, arguments)
        results[str(num_replicas)] = simulate(trace, num_replicas, arguments.policies)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
