"""What each number format costs in quality on a CPU: SmolLM2-135M, requantized by llama.cpp's own tool.

For each kind, over the first tokens of our own documentation: the log probability that native kernels give
each token, beside float32 on the same dequantized weights (the largest and the mean error, and how often the
likeliest token is the same), and the perplexity of both and of llama.cpp with the same file. It needs
llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from tokenizers import Tokenizer

from benchmarks import record
from pagewire import LLM, SamplingParams
from pagewire.hub import ALIASES, DEFAULT_MODEL, resolve_model
from pagewire.hub.resolve import gguf_file

ROOT = Path(__file__).parents[1]
TEXTS = ("docs/architecture.md", "docs/kernels.md", "docs/failures.md")
WINDOWS, WINDOW = 8, 512
# As llama.cpp's tool calls them: the number that its API has for each; the file itself has Q4_1.
KINDS = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "Q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument(
        "--kinds", nargs="*", choices=[*KINDS], default=[*KINDS], help="beside the file itself"
    )
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"of {WINDOW} tokens (default %(default)s)"
    )
    parser.add_argument(
        "--llama-cpp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="its perplexity too (default %(default)s)",
    )
    arguments = parser.parse_args()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    windows = _windows(arguments.windows)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in _files(Path(scratch), arguments.kinds):
            results[name] = _measure(path, windows, with_llama_cpp=arguments.llama_cpp)
            print(name, results[name], flush=True)
    record.write(arguments.json, {"tokens": len(windows) * (WINDOW - 1), "kinds": results})


def _windows(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / "tokenizer.json"))
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) >= count * WINDOW
    return [ids[at : at + WINDOW] for at in range(0, count * WINDOW, WINDOW)]


def _files(scratch: Path, kinds: list[str]) -> Iterator[tuple[str, Path]]:
    """The file as it is, then requantized: each kind rounds the 4-bit numbers once more."""
    given = gguf_file(ALIASES[DEFAULT_MODEL])
    yield "Q4_1, as published", given
    for name in kinds:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = KINDS[name], True
        made = scratch / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(given).encode(), str(made).encode(), settings) != 0:
            raise SystemExit(f"llama.cpp cannot make {name}")
        yield name, made
        made.unlink()


def _measure(path: Path, windows: list[list[int]], *, with_llama_cpp: bool) -> dict[str, Any]:
    native, likeliest = _told_by_pagewire(path, "auto", windows)
    exact, exactly_likeliest = _told_by_pagewire(path, "float32", windows)
    errors = np.abs(native - exact)
    told = {
        "largest error": round(float(errors.max()), 4),
        "mean error": round(float(errors.mean()), 5),
        "same likeliest token": round(float((likeliest == exactly_likeliest).mean()), 4),
        "perplexity": round(math.exp(-native.mean()), 3),
        "perplexity in float32": round(math.exp(-exact.mean()), 3),
    }
    if with_llama_cpp:
        theirs = _told_by_llama_cpp(path, windows)
        told["perplexity of llama.cpp"] = round(math.exp(-theirs.mean()), 3)
    return told


def _told_by_pagewire(path: Path, dtype: str, windows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each token's log probability, and the likeliest token in its place."""
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
    with LLM(str(path), dtype=dtype, enable_prefix_caching=False, max_model_len=2 * WINDOW) as llm:
        outputs = llm.generate(windows, sampling)
    told = [entry for output in outputs for entry in (output.prompt_logprobs or []) if entry is not None]
    likeliest = [next(iter(entry.top)) for entry in told]
    return np.array([entry.logprob for entry in told]), np.array(likeliest)


def _told_by_llama_cpp(path: Path, windows: list[list[int]]) -> np.ndarray:
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = WINDOW
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(WINDOW, 0, 1)
    told = []
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for index, token in enumerate(window):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, index, 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = True
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for index, token in enumerate(window[1:]):
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, index), (vocab_size,))
            largest = row.max()
            total = np.exp(row - largest, dtype=np.float64).sum()
            told.append(row[token] - largest - math.log(total))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.array(told)


if __name__ == "__main__":
    main()
