"""SmolLM2-135M on a CPU: pagewire beside transformers, in turns within one run.

Rows: one stream's decoding rate, 16 requests of 128/64 (transformers: one static batch), prefill of 1,024
tokens, and the time to load. Greedy, token-id prompts that share nothing. The machine may be shared, so
compare the columns of one run with each other and nothing else.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks import record
from benchmarks.serving_cpu import prompt
from pagewire import LLM, SamplingParams
from pagewire.hub import DEFAULT_MODEL, resolve_model

ROUNDS = 3
DECODE_TOKENS, NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, PREFILL_TOKENS = 64, 16, 128, 64, 1024


class Engine(Protocol):
    """Something that generates greedily."""

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Generates exactly `max_tokens` after every prompt; prompts are equally long."""

    def close(self) -> None:
        """Frees its memory."""


class Pagewire:
    """This project, offline: core here, worker in its own process."""

    def __init__(self, dtype: str) -> None:
        self._llm = LLM(dtype=dtype, enable_prefix_caching=False)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        self._llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))

    def close(self) -> None:
        self._llm.close()


class Transformers:
    """transformers' own generate() on the same weights."""

    def __init__(self, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        directory = resolve_model(DEFAULT_MODEL, dequantized=True)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def close(self) -> None:
        del self._model
        gc.collect()


ENGINES: dict[str, Callable[[str], Engine]] = {"pagewire": Pagewire, "transformers": Transformers}


def measure(engine: Engine, salt: int) -> dict[str, float]:
    """One round of every row, tokens per second."""

    def seconds(num_prompts: int, length: int, max_tokens: int, offset: int) -> float:
        prompts = [prompt(length, salt + offset + index) for index in range(num_prompts)]
        began = time.perf_counter()
        engine.generate(prompts, max_tokens)
        return time.perf_counter() - began

    first = seconds(1, 32, 1, 0)
    decode = seconds(1, 32, 1 + DECODE_TOKENS, 1) - first
    batch = seconds(NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, 100)
    prefill = seconds(1, PREFILL_TOKENS, 1, 200)
    return {
        "one_stream_decode": DECODE_TOKENS / decode,
        "16x128/64_output": NUM_STREAMS * OUTPUT_TOKENS / batch,
        "prefill_1024": PREFILL_TOKENS / prefill,
    }


def compare(dtype: str) -> dict[str, Any]:
    """Medians for both engines, measured in turns, with pagewire's ratio to transformers."""
    engines, load = {}, {}
    for name, make in ENGINES.items():
        began = time.perf_counter()
        engines[name] = make(dtype)
        load[name] = round(time.perf_counter() - began, 2)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for round_ in range(ROUNDS + 1):  # the first is the warm-up
        for name, engine in engines.items():
            result = measure(engine, 1000 * (round_ + 1))
            if round_:
                rounds[name].append(result)
    for engine in engines.values():
        engine.close()
    table: dict[str, Any] = {"load_s": load}
    for row in rounds["pagewire"][0]:
        medians = {name: statistics.median(result[row] for result in rounds[name]) for name in engines}
        table[f"{row}_tokens_per_s"] = {name: round(value, 1) for name, value in medians.items()}
        table[f"{row}_tokens_per_s"]["ratio"] = round(medians["pagewire"] / medians["transformers"], 2)
    return table


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    torch.set_num_threads(2)
    record.write(arguments.json, {dtype: compare(dtype) for dtype in ("float32", "bfloat16")})


if __name__ == "__main__":
    main()
