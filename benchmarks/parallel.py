"""Several GPUs beside one: tensor and pipeline parallel on random weights, and sums over ranks by themselves.

python -m benchmarks.parallel --json parallel.json     all that so many GPUs allow; about 4 minutes on two
python -m benchmarks.parallel --only sums               sums alone, half a minute

Models are those of SHAPES, with random weights; each runs the workloads W1 (256 requests at once), W3 (one
stream) and W4 (prompts alone) on one GPU where it fits, and on all GPUs in every way that divides them. Sums
are timed in a CUDA graph of many, by NCCL and by our own kernel, so that the host has no part in them. The
share of communication is what the sums of a step take by themselves, of a step's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from pagewire.base.errors import PagewireError
from pagewire.bench.engine import BenchEngine
from pagewire.bench.shapes import shape_directory
from pagewire.bench.targets import settings
from pagewire.bench.throughput import measure_throughput
from pagewire.bench.workloads import NAMED

WORKLOADS = ("W1", "W3", "W4")
SUM_BYTES = [8 << 10 << power for power in range(11)]
LARGEST_ROOM = 8 << 20
IN_A_GRAPH, REPLAYS = 20, 20


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its sizes.

    Attributes:
        changes: what its configuration has other than llama8b's.
        options: of the worker.
        fewest: GPUs that hold it.
    """

    changes: dict[str, Any]
    options: dict[str, Any]
    fewest: int = 1


SHAPES = {
    "llama8b": Shape({}, {}),
    "qwen3-32b": Shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
        },
        {},
    ),
    "llama70b-fp8": Shape(
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        {"quantization": "fp8"},
        fewest=2,
    ),
}


def layouts(num_gpus: int, fewest: int) -> list[tuple[int, int]]:
    """(ranks of a stage, stages): one GPU, then all of them in every way."""
    everything = [(num_gpus // stages, stages) for stages in range(1, num_gpus + 1) if num_gpus % stages == 0]
    return [(1, 1)] * (fewest == 1 < num_gpus) + everything


def write_shape(name: str, directory: Path) -> Path:
    """A directory with nothing but the shape's configuration."""
    source = shape_directory("llama8b")
    assert source is not None
    config = json.loads((source / "config.json").read_text()) | SHAPES[name].changes
    target = directory / name
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps(config))
    return target


def run_shape(name: str, directory: Path, num_gpus: int, sums: dict[str, Any]) -> dict[str, Any]:
    """One shape in all layouts."""
    model = write_shape(name, directory)
    config = json.loads((model / "config.json").read_text())
    results: dict[str, Any] = {}
    for tp, pp in layouts(num_gpus, SHAPES[name].fewest):
        key = f"tp{tp} pp{pp}"
        try:
            results[key] = _run(name, model, config, tp, pp, sums)
        except PagewireError as error:
            results[key] = {"error": error.message}
        print(name, key, json.dumps(results[key]), flush=True)
    alone = results.get("tp1 pp1", {})
    for each in results.values():
        for workload in WORKLOADS:
            if "tokens_per_s" in alone.get(workload, {}) and "tokens_per_s" in each.get(workload, {}):
                each[workload]["beside_one_gpu"] = round(
                    each[workload]["tokens_per_s"] / alone[workload]["tokens_per_s"], 3
                )
    return results


def _run(
    name: str, model: Path, config: dict[str, Any], tp: int, pp: int, sums: dict[str, Any]
) -> dict[str, Any]:
    workloads = [NAMED[each] for each in WORKLOADS]
    options = {
        **settings(),
        "load_format": "dummy",
        "device": "cuda",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        **SHAPES[name].options,
    }
    began = time.perf_counter()
    with BenchEngine(str(model), workloads, options) as engine:
        result: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 1)}
        engine.warm_up()
        for key, workload in zip(WORKLOADS, workloads, strict=True):
            measured = measure_throughput(engine, workload, 1 if key == "W4" else 2)
            steps = measured["runs"][0]["num_steps"]
            seconds = measured["runs"][-1]["seconds"]
            found: dict[str, Any] = {
                "unit": measured["unit"],
                "tokens_per_s": measured["tokens_per_s"],
                "step_ms": round(seconds / steps * 1e3, 3),
            }
            if tp > 1 and key != "W4":
                rows = workload.num_requests if key == "W1" else 1
                share = _communication_ms(config, rows, sums) / found["step_ms"] / pp
                found["communication_share"] = round(share, 3)
            result[key] = found
    return result


def _communication_ms(config: dict[str, Any], rows: int, sums: dict[str, Any]) -> float:
    """What the sums of a step of `rows` decodes take by themselves: two a layer, and the embedding's."""
    num_bytes = rows * config["hidden_size"] * 2
    sizes = [size for size in SUM_BYTES if size >= num_bytes] or SUM_BYTES[-1:]
    found = sums[str(sizes[0])]
    return float((2 * config["num_hidden_layers"] + 1) * min(found.values()) / 1e3)


def measure_sums(num_gpus: int, directory: Path) -> dict[str, Any]:
    """Microseconds of a sum over all GPUs, by its bytes, of each way."""
    store = directory / "sums"
    command = [sys.executable, "-m", "benchmarks.parallel", "--sums-of", str(store), str(num_gpus)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(num_gpus)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=120)
        for rank in ranks[1:]:
            rank.wait(30)
    finally:
        for rank in ranks:
            rank.kill()
    return dict(json.loads(output.splitlines()[-1]))


def sums_of_rank(store_path: str, size: int, rank: int) -> None:
    """One rank's part of `measure_sums`; the first prints the result."""
    import torch.distributed

    from engine.cuda.peer_sums import PeerSums

    os.environ["NCCL_NVLS_ENABLE"] = "0"
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist: Any = torch.distributed
    store = dist.FileStore(store_path, size)
    group = dist.ProcessGroupNCCL(store, rank, size)
    peers = PeerSums(rank, size, device, LARGEST_ROOM)
    store.set(f"address {rank}", peers.address().hex())
    peers.open([bytes.fromhex(store.get(f"address {other}").decode()) for other in range(size)])
    group.allreduce([torch.zeros(1, device=device)]).wait()
    torch.cuda.synchronize()

    def by_nccl(tensor: torch.Tensor) -> None:
        group.allreduce([tensor]).wait()

    found: dict[str, dict[str, float]] = {}
    for num_bytes in SUM_BYTES:
        found[str(num_bytes)] = {
            "nccl_us": _time_sum(by_nccl, num_bytes, device, by_nccl),
            "ours_us": _time_sum(peers.all_reduce, num_bytes, device, by_nccl),
        }
    if rank == 0:
        print(json.dumps(found), flush=True)
    by_nccl(torch.zeros(1, device=device))
    torch.cuda.synchronize()
    os._exit(0)  # NCCL's own end may wait for others


def _time_sum(add: Any, num_bytes: int, device: torch.device, meet: Any) -> float:
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    add(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for _ in range(IN_A_GRAPH):
            add(tensor)
    meet(torch.zeros(1, device=device))
    samples: list[float] = []
    make_event: Any = torch.cuda.Event
    for _ in range(REPLAYS):
        begin, end = (make_event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(float(begin.elapsed_time(end)) * 1e3 / IN_A_GRAPH)
    return round(statistics.median(samples[2:]), 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what was asked for."""
    parser = record.parser(__doc__)
    parser.add_argument("--only", help=f"comma-separated: sums, {', '.join(SHAPES)}")
    parser.add_argument("--gpus", type=int, help="how many to use; default all")
    parser.add_argument("--sums-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sums_of:
        store, size, rank = options.sums_of
        sums_of_rank(store, int(size), int(rank))
        return
    num_gpus = options.gpus or torch.cuda.device_count()
    wanted = (options.only or ",".join(("sums", *SHAPES))).split(",")
    results: dict[str, Any] = {"num_gpus": num_gpus}
    with tempfile.TemporaryDirectory() as directory:
        sums = measure_sums(num_gpus, Path(directory)) if num_gpus > 1 else {}
        results["sums"] = sums
        print("sums", json.dumps(sums), flush=True)
        for name in SHAPES:
            if name in wanted and num_gpus >= SHAPES[name].fewest:
                results[name] = run_shape(name, Path(directory), num_gpus, sums)
                record.write(options.json, results)
    record.write(options.json, results)


if __name__ == "__main__":
    main()
