"""What `pagewire export` costs in quality: the perplexity of SmolLM2-135M before and after, by method.

The text is the first tokens of pages of our own documentation that are not in the text that exports are
calibrated with by default. Beside each method that looks at activations there is rounding to nearest, on the
same grid and in the same file format. The files are computed with by the native CPU engine, as they are
served.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer

from benchmarks import record
from pagewire import LLM, SamplingParams
from pagewire.export import awq, methods
from pagewire.export.config import ExportConfig
from pagewire.export.run import export_hf
from pagewire.hub import DEFAULT_MODEL, resolve_model

ROOT = Path(__file__).parents[1]
TEXTS = ("docs/architecture.md", "docs/kernels.md", "docs/failures.md")
WINDOWS, WINDOW = 24, 512
KINDS = {
    "awq, rounded to nearest": {"quant_method": "awq"},
    "awq": {"quant_method": "awq"},
    "gptq, rounded to nearest": {"quant_method": "gptq"},
    "gptq": {"quant_method": "gptq"},
    "gptq, 8 bits": {"quant_method": "gptq", "quant_bits": 8},
    "int8": {"quant_method": "int8"},
    "fp8": {"quant_method": "fp8"},
}


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--kinds", nargs="*", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--group-sizes", nargs="*", type=int, default=[64, 32])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {WINDOW} tokens (%(default)s)")
    parser.add_argument(
        "--texts", nargs="*", default=[*TEXTS], help="whose first tokens are scored (default %(default)s)"
    )
    arguments = parser.parse_args()
    windows = _windows(arguments.texts, arguments.windows)
    results: dict[str, dict[str, float]] = {"plain": {"perplexity": _perplexity(DEFAULT_MODEL, windows)}}
    print("plain", results["plain"], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, config, seconds in _exports(Path(scratch), arguments):
            results[name] = {
                "perplexity": _perplexity(str(config.out), windows),
                "seconds to export": round(seconds, 1),
            }
            print(name, results[name], flush=True)
    record.write(arguments.json, {"tokens": len(windows) * (WINDOW - 1), "kinds": results})


def _windows(texts: list[str], count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / "tokenizer.json"))
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in texts)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) >= count * WINDOW, len(ids)
    return [ids[at : at + WINDOW] for at in range(0, count * WINDOW, WINDOW)]


def _exports(scratch: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, ExportConfig, float]]:
    for kind in arguments.kinds:
        grouped = KINDS[kind]["quant_method"] in ("awq", "gptq")
        for group_size in arguments.group_sizes if grouped else [None]:
            name = kind if group_size is None else f"{kind}, groups of {group_size}"
            config = ExportConfig(
                model=DEFAULT_MODEL,
                out=scratch / name.replace(" ", "-"),
                group_size=group_size,
                num_samples=arguments.num_samples,
                **KINDS[kind],  # type: ignore[arg-type]
            )
            started = time.monotonic()
            with _rounding_to_nearest(kind.endswith("nearest")):
                export_hf(config)
            yield name, config, time.monotonic() - started


def _rounding_to_nearest(wanted: bool) -> mock._patch[object]:
    """Methods then know nothing of activations."""
    if not wanted:
        return mock.patch.object(awq, "BITS", awq.BITS)
    return mock.patch.object(methods.Method, "needs_texts", False)


def _perplexity(model: str, windows: list[list[int]]) -> float:
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    with LLM(model, enable_prefix_caching=False, max_model_len=2 * WINDOW) as llm:
        outputs = llm.generate(windows, sampling)
    told = [entry for output in outputs for entry in (output.prompt_logprobs or []) if entry is not None]
    return round(math.exp(-sum(entry.logprob for entry in told) / len(told)), 3)


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    main()
