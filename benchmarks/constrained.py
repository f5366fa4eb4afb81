"""What constrained output costs: a mask for each token, and what that does to the service's streams.

Masks: a text of each constraint is walked through token by token, as the scheduler does it in a thread
(advance the matcher, make the next mask), over SmolLM2's vocabulary and over one of 128,000 tokens, made
for this of the Python that is installed. Streams: four free ones alone, beside four more, and beside four
constrained ones, by turns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import record
from pagewire.bench.percentiles import percentile
from pagewire.hub import DEFAULT_MODEL, resolve_model
from pagewire.hub.tokenizer.token_pieces import read_tokenizer
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.structured.grammars import Grammars
from pagewire.wire.sampling_params import StructuredOutput
from tools.service import Service

LARGE_VOCABULARY = 128_000
WALKS = 20
NUM_STREAMS, OUTPUT_TOKENS, ROUNDS = 4, 48, 5

ORDER = {
    "type": "object",
    "properties": {
        "customer": {"type": "string"},
        "status": {"enum": ["open", "paid", "shipped"]},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["name", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["customer", "status", "items"],
    "additionalProperties": False,
}
ORDER_TEXT = {
    "customer": "Ada Lovelace, 12 St James's Square, London",
    "status": "shipped",
    "items": [{"name": name, "count": len(name)} for name in ("pencil", "difference engine", "cards", "oil")],
}
SUM = 'root ::= term (" + " term)* " = " digit+\nterm ::= digit+ | "(" term " * " term ")"\ndigit ::= [0-9]'
CONSTRAINTS: dict[str, tuple[StructuredOutput, str]] = {
    "json_schema": (StructuredOutput(json_schema=json.dumps(ORDER)), json.dumps(ORDER_TEXT)),
    "json_object": (StructuredOutput(json_object=True), json.dumps(ORDER_TEXT)),
    "regex": (
        StructuredOutput(regex=r"([A-Z][a-z]+ ){3,40}on \d{4}-\d{2}-\d{2}(, [\w.]+@[\w.]+)*"),
        "The Quick Brown Fox Jumps Over The Lazy Dog on 2026-11-22, fox@woods.example, dog@yard.example",
    ),
    "grammar": (StructuredOutput(grammar=SUM), "12 + (3 * 45) + ((6 * 7) * 8) + 9 + (10 * 11) = 592"),
}


def large_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer, trained on the sources of the installed Python's packages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGE_VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("purelib")).glob("t*/**/*.py"))
    tokenizer.train([str(path) for path in sources], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def masks(model_dir: Path, eos_token_id: int) -> dict[str, Any]:
    """Times of compiling each constraint and of each token's step."""
    tokenizer = read_tokenizer(model_dir)
    began = time.perf_counter()
    grammars = Grammars(str(model_dir), tokenizer.get_vocab_size(), (eos_token_id,))
    grammars.load()
    results: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab_size(),
        "read_the_tokenizer_s": round(time.perf_counter() - began, 3),
    }
    for name, (structured, text) in CONSTRAINTS.items():
        began = time.perf_counter()
        grammars.compile(structured)
        compiled = time.perf_counter() - began
        steps: list[float] = []
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for _ in range(WALKS):
            matcher = grammars.matcher(structured)
            assert matcher is not None
            matcher.mask()
            for token_id in ids:
                began = time.perf_counter()
                matcher.advance([token_id])
                matcher.mask()
                steps.append(time.perf_counter() - began)
        results[name] = {
            "check_and_compile_ms": round(compiled * 1e3, 1),
            "tokens": len(ids),
            "step_us_p50": round(percentile(steps, 50) * 1e6),
            "step_us_p99": round(percentile(steps, 99) * 1e6),
            "step_us_max": round(max(steps) * 1e6),
        }
    grammars.close()
    return results


def request(number: int, constraint: StructuredOutput | None) -> pb.GenerateRequest:
    """A request for OUTPUT_TOKENS; constrained ones are held to words without end."""
    sampling = pb.SamplingParams(temperature=1, seed=number, max_tokens=OUTPUT_TOKENS)
    if constraint is None:
        sampling.ignore_eos = True
    else:
        sampling.structured_output.regex = constraint.regex
    return pb.GenerateRequest(text=f"Request {number}: once upon a time", sampling=sampling)


async def rates(stub: Any, num_free: int, num_constrained: int, offset: int) -> tuple[float, float]:
    """Tokens per second of each free and each constrained stream, means over streams that ran at once."""

    async def rate(number: int, constraint: StructuredOutput | None) -> float:
        times: list[float] = []
        tokens = 0
        async for event in stub.Generate(request(offset + number, constraint)):
            if event.HasField("delta") and event.delta.token_ids:
                times.append(time.perf_counter())
                tokens += len(event.delta.token_ids)
        assert tokens == OUTPUT_TOKENS
        return (tokens - 1) / (times[-1] - times[0])

    held = StructuredOutput(regex="([a-z]{1,12} ){500}")
    kinds = [None] * num_free + [held] * num_constrained
    found = await asyncio.gather(*(rate(number, kind) for number, kind in enumerate(kinds)))
    free, constrained = found[:num_free], found[num_free:]
    return statistics.mean(free or [0]), statistics.mean(constrained or [0])


async def streams(directory: Path) -> dict[str, Any]:
    """Each case's medians over ROUNDS, in turns."""
    cases = {
        "free alone": (NUM_STREAMS, 0),
        "free beside free": (2 * NUM_STREAMS, 0),
        "free beside constrained": (NUM_STREAMS, NUM_STREAMS),
        "constrained alone": (0, NUM_STREAMS),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with Service(directory) as service:
        async with grpc.aio.insecure_channel(service.grpc_target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for round_ in range(ROUNDS + 1):
                for number, (name, (num_free, num_constrained)) in enumerate(cases.items()):
                    pair = await rates(stub, num_free, num_constrained, 100 * (10 * round_ + number))
                    if round_:  # the first round warms up
                        found[name].append(pair)
    return {
        name: {
            kind: round(statistics.median(pair[index] for pair in pairs), 2)
            for index, kind in enumerate(("free_tokens_per_s", "constrained_tokens_per_s"))
            if cases[name][index]
        }
        for name, pairs in found.items()
    }


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model_dir = resolve_model(DEFAULT_MODEL)
        results = {
            "masks": {
                "smollm2": masks(
                    model_dir, json.loads((model_dir / "config.json").read_text())["eos_token_id"]
                ),
                "large": masks(large_tokenizer(directory), 0),
            },
            f"{NUM_STREAMS} streams of {OUTPUT_TOKENS}": asyncio.run(streams(directory)),
        }
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
