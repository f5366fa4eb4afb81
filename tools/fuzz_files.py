"""Damages model files at random and loads them, each time in a process with limits on memory and time.

python -m tools.fuzz_files --examples 2000 --seconds 300 --seed 1 --kind safetensors --kind gguf

A case passes if the files are loaded, or refused by a ConfigError of one line that names a file. Everything
else is printed with its seed and its files are kept: another exception, a signal, too much time or memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

from tests.unit.corrupt.mutations import (
    damage_gguf,
    damage_json,
    damage_safetensors,
    dump,
    gguf_fields,
)
from tests.unit.corrupt.samples import any_tokenizer, write_directory, write_gguf
from tests.unit.corrupt.sandbox import (
    Load,
    Outcome,
    load_engine,
    load_gguf,
    load_streamed,
    load_text,
    run_case,
    warm_up,
)


@dataclass(frozen=True)
class Kind:
    """A kind of case: prepares files, damages one, loads them."""

    prepare: Callable[[Path], Path]
    damage: Callable[[Path, Random], None]
    loads: tuple[Load, ...]


def _damage_json_file(*names: str) -> Callable[[Path, Random], None]:
    def damage(directory: Path, random: Random) -> None:
        path = directory / random.choice(names)
        path.write_bytes(damage_json(json.loads(path.read_bytes()), random))

    return damage


def _damage_any_tokenizer(directory: Path, random: Random) -> None:
    document = any_tokenizer(random)
    whole = random.random() < 0.1
    (directory / "tokenizer.json").write_bytes(dump(document) if whole else damage_json(document, random))


def _damage_weights(directory: Path, random: Random) -> None:
    path = random.choice(sorted(directory.glob("*.safetensors")))
    path.write_bytes(damage_safetensors(path.read_bytes(), random))


_FIELDS: dict[int, list[tuple[int, int]]] = {}


def _damage_gguf(path: Path, random: Random) -> None:
    data = path.read_bytes()
    if len(data) not in _FIELDS:
        _FIELDS[len(data)] = gguf_fields(data)
    path.write_bytes(damage_gguf(data, random, _FIELDS[len(data)]))


KINDS = {
    "config": Kind(write_directory, _damage_json_file("config.json"), (load_engine,)),
    "generation": Kind(
        write_directory, _damage_json_file("generation_config.json"), (load_engine, load_text)
    ),
    "safetensors": Kind(write_directory, _damage_weights, (load_engine,)),
    "streamed": Kind(write_directory, _damage_weights, (load_streamed,)),
    "index": Kind(
        lambda path: write_directory(path, shards=3),
        _damage_json_file("model.safetensors.index.json"),
        (load_engine,),
    ),
    "tokenizer": Kind(write_directory, _damage_json_file("tokenizer.json"), (load_text,)),
    "sentencepiece": Kind(
        lambda path: write_directory(path, sentencepiece=True),
        _damage_json_file("tokenizer.json"),
        (load_text,),
    ),
    "any_tokenizer": Kind(write_directory, _damage_any_tokenizer, (load_text,)),
    "tokenizer_config": Kind(write_directory, _damage_json_file("tokenizer_config.json"), (load_text,)),
    "gguf": Kind(lambda path: write_gguf(path / "tiny.gguf"), _damage_gguf, (load_gguf,)),
}


def _signature(outcome: Outcome) -> str:
    """Groups cases that have one cause."""
    lines = [line for line in outcome.report.splitlines() if line.strip()]
    if outcome.status != "found":
        return outcome.status + ": " + next((line for line in lines if "panicked" in line), "")[-100:]
    if lines and lines[0].startswith("ConfigError whose"):
        return lines[0][:60]
    frames = [line.strip() for line in lines if line.startswith("  File")]
    return f"{lines[-1].split(':')[0] if lines else '?'} at {frames[-1] if frames else '?'}"


@dataclass(frozen=True)
class Limits:
    """When to stop."""

    examples: int
    seconds: float


def fuzz(names: list[str], limits: Limits, seed: int, *, keep: Path | None, messages: bool) -> int:
    """Runs cases of all kinds by turns; the number of findings."""
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as scratch:
        prepared = {}
        for name in names:
            (Path(scratch) / name).mkdir()
            prepared[name] = KINDS[name].prepare(Path(scratch) / name)
        warm_up()
        counts: Counter[tuple[str, str]] = Counter()
        findings: dict[str, list[str]] = {}
        slowest: dict[str, tuple[float, str]] = {}
        largest: dict[str, tuple[int, str]] = {}
        end = time.monotonic() + limits.seconds
        for number in range(limits.examples):
            if time.monotonic() > end:
                break
            name = names[number % len(names)]
            case = f"{name}:{seed + number}"
            work = Path(scratch) / "case"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(Path(scratch) / name, work)
            path = work / prepared[name].relative_to(Path(scratch) / name)
            KINDS[name].damage(path, Random(case))
            outcome = run_case(KINDS[name].loads, path, Path(scratch) / "log")
            counts[name, outcome.status] += 1
            if messages and outcome.status == "refused":
                print(f"{case}: {outcome.report}")
            slowest[name] = max(slowest.get(name, (0.0, "")), (outcome.seconds, case))
            largest[name] = max(largest.get(name, (0, "")), (outcome.growth, case))
            if outcome.status not in ("loaded", "refused"):
                _note(findings, outcome, case, name, work, keep)
        _report(counts, findings, slowest, largest)
        return sum(map(len, findings.values()))


def _note(
    findings: dict[str, list[str]], outcome: Outcome, case: str, name: str, work: Path, keep: Path | None
) -> None:
    signature = f"{name}: {_signature(outcome)}"
    if signature not in findings:
        print(f"\n== {case} {outcome.status} {outcome.seconds:.1f} s {outcome.growth / 1e6:.0f} MB")
        print(outcome.report[-2500:], flush=True)
        if keep is not None:
            shutil.copytree(work, keep / case.replace(":", "-"), dirs_exist_ok=True)
    findings.setdefault(signature, []).append(case)


def _report(counts: Any, findings: Any, slowest: Any, largest: Any) -> None:
    print()
    for name in sorted(slowest):
        statuses = ", ".join(f"{status} {n}" for (kind, status), n in sorted(counts.items()) if kind == name)
        seconds, slow = slowest[name]
        growth, large = largest[name]
        print(f"{name}: {statuses}")
        print(f"  slowest {seconds:.1f} s ({slow}), most memory {growth / 1e6:.0f} MB ({large})")
    print(
        f"{sum(counts.values())} cases, {sum(map(len, findings.values()))} findings of {len(findings)} sorts"
    )
    for signature, cases in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"  {len(cases):5d}  {signature}  e.g. {' '.join(cases[:3])}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1000, metavar="N")
    parser.add_argument("--seconds", type=float, default=600, metavar="S")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; default: all")
    parser.add_argument("--messages", action="store_true", help="print every refusal")
    parser.add_argument("--keep", type=Path, help="where the files of findings are kept")
    given = parser.parse_args()
    names = given.kind or list(KINDS)
    limits = Limits(given.examples, given.seconds)
    sys.exit(1 if fuzz(names, limits, given.seed, keep=given.keep, messages=given.messages) else 0)


if __name__ == "__main__":
    main()
