"""A model of Llama 3.2's 1B shape with random weights in bfloat16 on a CPU: pagewire and transformers, in
turns within one run.

Rows as in engines_cpu, smaller: one stream, 16 requests of 16/8, prefill of 512. pagewire keeps the weights
in bfloat16 and computes in fp32; transformers computes in the number format that it is given.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from benchmarks.engines_cpu import THREADS, Pagewire, Sizes, Transformers, compare
from pagewire.hub import DEFAULT_MODEL, resolve_model

SIZES = Sizes(decode=8, prompt=16, output=8, prefill=512, rounds=2)
SHAPE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="of transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_checkpoint(directory)
        makers = {"pagewire": lambda: Pagewire("auto", str(directory))}
        for dtype in arguments.dtypes:
            makers[f"transformers {dtype}"] = lambda dtype=dtype: Transformers(dtype, directory)
        record.write(arguments.json, compare(makers, SIZES))


def write_checkpoint(directory: Path) -> None:
    """Random weights, with the tokenizer of another model, which nothing here uses."""
    SHAPE.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPE)
    torch.manual_seed(0)
    tensors = {
        name: torch.empty(each.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, each in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model(DEFAULT_MODEL) / name, directory)


if __name__ == "__main__":
    main()
