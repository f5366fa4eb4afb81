"""Tiny models to export, with a tokenizer, and what the files of quantized ones stand for, value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.unit.engine.quantized_checkpoints import AWQ_NIBBLE
from tests.unit.engine.tiny_model import write_model

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
WORDS = [f"w{index}" for index in range(60)]


def write_tokenizer(directory: Path) -> None:
    """A token for each word."""
    vocab = {word: index for index, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_exportable(directory: Path, **changes: Any) -> Path:
    """A random Llama with a tokenizer."""
    write_model(directory, **{**SHAPE, **changes})
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


def write_dataset(path: Path, count: int = 60) -> Path:
    """Lines in each of the forms."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for number in range(count):
        drawn = torch.randint(60, (40,), generator=generator).tolist()
        text = " ".join(WORDS[index] for index in drawn)
        forms = (
            {"text": text},
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "w1 w2"}]},
            {"query": text, "response": "w3 w4"},
        )
        lines.append(json.dumps(forms[number % 3]))
    path.write_text("\n".join(lines) + "\n")
    return path


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Those of every file that the index names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for name in sorted(set(index.values())):
        tensors |= load_file(directory / name)
    assert set(tensors) == set(index)
    return tensors


def write_dequantized(directory: Path, target: Path) -> Path:
    """A plain checkpoint of what a quantized one stands for, by the formats' descriptions."""
    config = json.loads((directory / "config.json").read_text())
    settings = config.pop("quantization_config")
    plain = {}
    for name, tensor in all_tensors(directory).items():
        module, _, part = name.rpartition(".")
        if part in ("qzeros", "scales", "g_idx", "weight_scale"):
            continue
        everything = all_tensors(directory) if part == "qweight" or tensor.dtype.itemsize == 1 else {}
        if part == "qweight":
            plain[f"{module}.weight"] = _of_words(module, everything, settings)
        elif part == "weight" and tensor.dtype.itemsize == 1:
            plain[name] = tensor.float() * everything[f"{module}.weight_scale"]
        else:
            plain[name] = tensor
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, target / "model.safetensors")
    return target


def _of_words(module: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    words, zero_words, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    bits, out_features = settings["bits"], scales.shape[1]
    if settings["quant_method"] == "awq":
        in_features = words.shape[0]
        group_of = torch.arange(in_features) // (in_features // len(scales))
        weight = torch.empty(out_features, in_features)
        for n in range(out_features):
            shift = 4 * AWQ_NIBBLE[n % 8]
            codes = (words[:, n // 8].long() >> shift) & 15
            zeros = (zero_words[:, n // 8].long() >> shift) & 15
            weight[n] = (codes - zeros[group_of]) * scales[group_of, n].float()
        return weight
    per_word = 32 // bits
    in_features = words.shape[0] * per_word
    g_idx, top = tensors[f"{module}.g_idx"].long(), 2**bits - 1
    weight = torch.empty(out_features, in_features)
    for k in range(in_features):
        codes = (words[k // per_word].long() >> (bits * (k % per_word))) & top
        column = torch.arange(out_features)
        zeros = (zero_words[g_idx[k], column // per_word].long() >> (bits * (column % per_word))) & top
        weight[:, k] = (codes - (zeros + 1)) * scales[g_idx[k]].float()
    return weight
