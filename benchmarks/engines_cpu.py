"""SmolLM2-135M on a CPU: pagewire, llama.cpp with the same file and transformers, in turns within one run.

Rows: one stream's decoding rate, 16 requests of 128/64 (llama.cpp: 16 sequences in each llama_decode;
transformers: one static batch), prefill of 1,024 tokens, and the time to load. Greedy, token-id prompts that
share nothing, as many threads as cores for each. Medians of the rounds, with the least and the most. The
machine may be shared, so compare the columns of one run with each other and nothing else. llama.cpp takes
part where llama-cpp-python is installed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks import record
from benchmarks.serving_cpu import prompt
from pagewire import LLM, SamplingParams
from pagewire.hub import ALIASES, DEFAULT_MODEL, resolve_model
from pagewire.hub.resolve import gguf_file

THREADS = os.cpu_count() or 1
_LLAMA_BATCH = 2048


@dataclass(frozen=True)
class Sizes:
    """What a round measures, in tokens: what one stream decodes; prompt and output of each of several; a
    prompt that is read. And how many rounds count."""

    decode: int = 64
    streams: int = 16
    prompt: int = 128
    output: int = 64
    prefill: int = 1024
    rounds: int = 5


SMOLLM2 = Sizes()


class Engine(Protocol):
    """Something that generates greedily."""

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Generates exactly `max_tokens` after every prompt; prompts are equally long."""

    def close(self) -> None:
        """Frees its memory."""


class Pagewire:
    """This project, offline: core here, worker in its own process."""

    def __init__(self, dtype: str, model: str = DEFAULT_MODEL) -> None:
        self._llm = LLM(model, dtype=dtype, enable_prefix_caching=False)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        self._llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))

    def close(self) -> None:
        self._llm.close()


class LlamaCpp:
    """llama.cpp by its own API, on the same GGUF file: a context for one sequence and one for sixteen."""

    def __init__(self, sizes: Sizes) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = str(gguf_file(ALIASES[DEFAULT_MODEL])).encode()
        self._model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._contexts = {
            1: self._context(1, sizes.prefill + sizes.decode),
            sizes.streams: self._context(sizes.streams, sizes.streams * (sizes.prompt + sizes.output)),
        }
        self._batch = llama_cpp.llama_batch_init(_LLAMA_BATCH, 0, 1)

    def _context(self, num_sequences: int, num_tokens: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = num_tokens + 256 * num_sequences, num_sequences
        settings.n_batch = _LLAMA_BATCH
        settings.n_threads = settings.n_threads_batch = THREADS
        return self._api.llama_init_from_model(self._model, settings)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        context = self._contexts[len(prompts)]
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        last = self._decode(context, [(s, p, t) for s, ids in enumerate(prompts) for p, t in enumerate(ids)])
        for position in range(len(prompts[0]), len(prompts[0]) + max_tokens - 1):
            last = self._decode(context, [(s, position, token) for s, token in enumerate(last)])

    def _decode(self, context: Any, tokens: list[tuple[int, int, int]]) -> list[int]:
        """Computes tokens, each of a sequence at a position; the likeliest after the last one of each
        sequence."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        ends = {sequence: index for index, (sequence, _, _) in enumerate(tokens)}
        for index, (sequence, position, token) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = ends[sequence] == index
        if self._api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = (self._api.llama_get_logits_ith(context, index) for index in ends.values())
        return [int(np.ctypeslib.as_array(row, (self._vocab_size,)).argmax()) for row in rows]

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        for context in self._contexts.values():
            self._api.llama_free(context)
        self._api.llama_model_free(self._model)


class Transformers:
    """transformers' own generate() on the same weights."""

    def __init__(self, dtype: str, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

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


ENGINES: dict[str, Callable[[], Engine]] = {
    "pagewire": lambda: Pagewire("auto"),
    "llama.cpp": lambda: LlamaCpp(SMOLLM2),
    "pagewire float32": lambda: Pagewire("float32"),
    "transformers float32": lambda: Transformers("float32", resolve_model(DEFAULT_MODEL, dequantized=True)),
}


def measure(engine: Engine, salt: int, sizes: Sizes = SMOLLM2) -> dict[str, float]:
    """One round of every row, tokens per second."""

    def seconds(num_prompts: int, length: int, max_tokens: int, offset: int) -> float:
        prompts = [prompt(length, salt + offset + index) for index in range(num_prompts)]
        began = time.perf_counter()
        engine.generate(prompts, max_tokens)
        return time.perf_counter() - began

    first = seconds(1, 32, 1, 0)
    decode = seconds(1, 32, 1 + sizes.decode, 1) - first
    batch = seconds(sizes.streams, sizes.prompt, sizes.output, 100)
    prefill = seconds(1, sizes.prefill, 1, 200)
    return {
        "one_stream_decode": sizes.decode / decode,
        f"{sizes.streams}x{sizes.prompt}/{sizes.output}_output": sizes.streams * sizes.output / batch,
        f"prefill_{sizes.prefill}": sizes.prefill / prefill,
    }


def compare(makers: Mapping[str, Callable[[], Engine]], sizes: Sizes = SMOLLM2) -> dict[str, Any]:
    """The engines' medians, measured in turns, with the least and the most, and the first one's ratio to
    each."""
    engines, load = {}, {}
    for name, make in makers.items():
        began = time.perf_counter()
        engines[name] = make()
        load[name] = round(time.perf_counter() - began, 2)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for round_ in range(sizes.rounds + 1):  # the first is the warm-up
        for name, engine in engines.items():
            result = measure(engine, 1000 * (round_ + 1), sizes)
            print(round_, name, result, flush=True)
            if round_:
                rounds[name].append(result)
    for engine in engines.values():
        engine.close()
    first = next(iter(engines))
    table: dict[str, Any] = {"load_s": load}
    for row in rounds[first][0]:
        results = {name: sorted(result[row] for result in rounds[name]) for name in engines}
        medians = {name: statistics.median(each) for name, each in results.items()}
        table[f"{row}_tokens_per_s"] = {
            name: {
                "median": round(medians[name], 1),
                "from": round(each[0], 1),
                "to": round(each[-1], 1),
                f"{first} is": round(medians[first] / medians[name], 2),
            }
            for name, each in results.items()
        }
    return table


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    known = [name for name in ENGINES if name != "llama.cpp" or find_spec("llama_cpp")]
    parser.add_argument("--engines", nargs="+", choices=known, default=known)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    versions = {"llama-cpp-python": version("llama_cpp_python")} if find_spec("llama_cpp") else {}
    record.write(arguments.json, {**versions, **compare({name: ENGINES[name] for name in arguments.engines})})


if __name__ == "__main__":
    main()
