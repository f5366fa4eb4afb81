"""The served rate beside the engine's own, and latencies at a rate, on one machine in one run.

For each shape: the workloads of the served table run offline (`pagewire bench throughput`), then through
`pagewire serve` over HTTP (`pagewire bench serve`), with random weights and a tokenizer made for the size of
the vocabulary, so that every token has text. What processes cost is their processor time meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import record
from pagewire.bench.serve.sweep import PRESETS
from pagewire.bench.shapes import shape_directory
from pagewire.bench.targets import served_targets, settings
from tools.service import Service

CASES = tuple(PRESETS)
WARMUP = 32


def write_model(shape: str, directory: Path) -> Path:
    """A model of this shape with a byte-level tokenizer of its size: all bytes, then made-up words."""
    source = shape_directory(shape)
    assert source is not None
    target = directory / shape
    shutil.copytree(source, target)
    vocab_size = json.loads((target / "config.json").read_text())["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number:x}" for number in range(vocab_size - len(letters))]
    vocabulary = {piece: token_id for token_id, piece in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def engine_options(device: str, max_num_seqs: int | None = None) -> list[str]:
    """The peer's engine options."""
    values = {**settings(), "load_format": "dummy", "device": device}
    if max_num_seqs is not None:
        values["max_num_seqs"] = max_num_seqs
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def pagewire_json(directory: Path, *arguments: str) -> dict[str, Any]:
    """Runs a `pagewire bench` command; the one result in its record."""
    path = directory / "record.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pagewire", "bench", *arguments, "--json", str(path)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not path.exists():
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stdout}")
    results = json.loads(path.read_text())["results"]
    (result,) = results.values() if isinstance(results, dict) else results
    return dict(result)


def offline(model: Path, case: str, device: str, directory: Path, repeat: int) -> dict[str, Any]:
    """The same requests given to the engine all at once, with as many rows as the case has open."""
    preset = PRESETS[case]
    rows = int(preset.concurrency) if preset.concurrency else None
    return pagewire_json(
        directory,
        "throughput",
        str(model),
        *engine_options(device, rows),
        *("--num-requests", str(preset.num_requests), "--repeat", str(repeat)),
        *("--prompt-len", preset.input_len, "--output-len", preset.output_len),
    )


def served(
    service: Service, case: str, vocab_size: int, processes: int, repeat: int, directory: Path
) -> dict[str, Any]:
    """A case over HTTP, several times: medians, also of what every process of the service took for it."""
    points: list[dict[str, Any]] = []
    for _ in range(repeat):
        before = service.processor_seconds()
        point = pagewire_json(
            directory,
            *("serve", "--url", service.http_url, "--workload", case, "--warmup", str(WARMUP)),
            *("--processes", str(processes), "--vocab-size", str(vocab_size)),
        )
        after = service.processor_seconds()
        point["processor_s"] = {name: round(after[name] - before[name], 2) for name in before}
        points.append(point)
    return medians_of_runs(points)


def medians_of_runs(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over a case's runs, and each run's throughput."""
    rates = [point["output_tokens_per_s"] for point in points]
    return {"runs": len(points), "output_tokens_per_s_of_each": rates, **_medians(points)}


def _medians(values: Sequence[Any]) -> Any:
    """Of results of one form: numbers' medians, lists joined, of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _medians([value[name] for value in values if name in value]) for name in names}
    if isinstance(first, list):
        return [part for value in values for part in value]
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return round(statistics.median(value for value in values if value is not None), 3)
    return first


def measure(shape: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything about one shape."""
    model = write_model(shape, directory)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    cases = arguments.cases.split(",")
    results: dict[str, Any] = {"targets": served_targets(shape)}
    results["offline"] = {
        case: offline(model, case, arguments.device, directory, arguments.repeat)
        for case in cases
        if PRESETS[case].rate is None
    }
    options = (
        *engine_options(arguments.device),
        *("--frontends", str(arguments.frontends), "--no-access-log"),
        *arguments.serve_options.split(),
    )
    with Service(directory, model=str(model), options=options) as service:
        results["served"] = {
            case: served(service, case, vocab_size, arguments.processes, arguments.repeat, directory)
            for case in cases
        }
    for case in cases:
        print(f"{shape} {case}: {json.dumps(results['served'][case])}", flush=True)
    return results


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--shapes", default="llama8b,qwen06b")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--processes", type=int, default=4, help="of the load generator")
    parser.add_argument("--serve-options", default="", help="further options of pagewire serve")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for shape in arguments.shapes.split(","):
            results[shape] = measure(shape, arguments, Path(directory))
            record.write(arguments.json, results)


if __name__ == "__main__":
    main()
