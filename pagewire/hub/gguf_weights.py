"""Dequantizes the tensors of a GGUF file into one float32 safetensors file."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf_reader import GgufFile, GgufTensor
from pagewire.hub.progress import Advance

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",  # nosec B105 # no password
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_WEIGHTS = {"rope_freqs.weight"}  # becomes rope_scaling in config.json
_LAYER_TENSOR = re.compile(r"blk\.([0-9]{1,4})\.(\w+)\.(weight|bias)")
_CHUNK_VALUES = 1 << 20  # 4 MB of float32: amortises the calls and stays near the cache
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor and where it goes: its name and shape in Hugging Face layout, its bytes in the file."""

    source: GgufTensor
    name: str
    shape: tuple[int, ...]
    heads_to_unpermute: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * _FLOAT32_BYTES


def weights_size(gguf: GgufFile) -> int:
    """Bytes of all tensors as float32."""
    return sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()) * _FLOAT32_BYTES


def write_weights(gguf: GgufFile, config: dict[str, Any], target: Path, advance: Advance) -> None:
    """Writes model.safetensors, dequantizing a few megabytes at a time.

    Raises:
        ConfigError: a tensor is missing, unknown, of the wrong shape or of a type that cannot be
            dequantized.
    """
    placed = _place(gguf, config)
    _check_shapes(gguf, config, placed)
    header = _safetensors_header(placed)
    done = 0
    with target.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(header)
        file.flush()

        def convert(chunk: tuple[_Placed, int, npt.NDArray[np.uint8]]) -> int:
            tensor, offset, raw = chunk
            values = _dequantize(gguf, tensor, raw)
            return os.pwrite(file.fileno(), values.data.cast("B"), len(header) + offset)

        for written in pool.map(convert, _chunks(placed)):
            done += written
            advance(done)
    expected = len(header) + placed[-1].end
    if target.stat().st_size != expected:
        raise OSError(f"{target} has {target.stat().st_size} bytes after writing {expected}")


def _place(gguf: GgufFile, config: dict[str, Any]) -> list[_Placed]:
    placed: list[_Placed] = []
    offset = 0
    for tensor in gguf.tensors.values():
        if tensor.name in _NOT_WEIGHTS:
            continue
        name = _hf_name(gguf, tensor.name)
        heads = 0
        if ".q_proj." in name:
            heads = config["num_attention_heads"]
        elif ".k_proj." in name:
            heads = config["num_key_value_heads"]
        placed.append(_Placed(tensor, name, tensor.shape, heads, offset))
        offset = placed[-1].end
    return placed


def _hf_name(gguf: GgufFile, name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise ConfigError(
            f"{gguf.path}: the tensor {name!r} is not part of a Llama model; it cannot be converted"
        )
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _check_shapes(gguf: GgufFile, config: dict[str, Any], placed: list[_Placed]) -> None:
    """Every weight the configuration asks for is there, with the shape it asks for."""
    found = {tensor.name: tensor.shape for tensor in placed}
    if config["num_hidden_layers"] > len(found):
        raise ConfigError(
            f"{gguf.path}: the metadata asks for {config['num_hidden_layers']} layers, and there are "
            f"{len(found)} tensors"
        )
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], hidden)
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased = defaultdict(bool, self_attn=config["attention_bias"], mlp=config["mlp_bias"])
    for index in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            full_name = f"model.layers.{index}.{name}"
            expected[f"{full_name}.weight"] = shape
            if biased[name.split(".")[0]]:
                expected[f"{full_name}.bias"] = shape[:1]
    for name in found.keys() - expected.keys():
        raise ConfigError(f"{gguf.path}: the tensor for {name} has no place in the model of the metadata")
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ConfigError(
                f"{gguf.path}: the tensor for {name} has the shape {found.get(name, 'missing')}; "
                f"the metadata asks for {shape}"
            )


def _safetensors_header(placed: list[_Placed]) -> bytes:
    """The header of the safetensors format: its length, then JSON padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in placed:
        offsets = [tensor.begin, tensor.end]
        entries[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(placed: list[_Placed]) -> Iterator[tuple[_Placed, int, npt.NDArray[np.uint8]]]:
    """Runs of whole rows: the tensor, their byte offset among all weights, their quantized bytes."""
    for tensor in placed:
        rows = _unpermuted(tensor.source.data, tensor.heads_to_unpermute, bias=len(tensor.shape) == 1)
        row_values = math.prod(tensor.shape) // rows.shape[0]
        step = max(1, _CHUNK_VALUES // row_values)
        for first in range(0, rows.shape[0], step):
            offset = tensor.begin + first * row_values * _FLOAT32_BYTES
            yield tensor, offset, rows[first : first + step]


def _unpermuted(data: npt.NDArray[np.uint8], heads: int, *, bias: bool) -> npt.NDArray[np.uint8]:
    """Undoes the row order that GGUF gives to q and k of Llama.

    llama.cpp rotates neighbouring values (2i, 2i+1) of a head, Hugging Face's Llama the halves
    (i, i + head_dim/2). Rows are moved whole, so the quantized bytes can be moved as they are.
    """
    if heads == 0:
        return data
    rows = data.reshape(-1, _FLOAT32_BYTES) if bias else data
    count, row_bytes = rows.shape
    paired = rows.reshape(heads, count // heads // 2, 2, row_bytes)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(data.shape)


def _dequantize(gguf: GgufFile, tensor: _Placed, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    # gguf works on 16 rows at a time; as the blocks lie one after another, longer rows mean fewer calls.
    _, type_size = GGML_QUANT_SIZES[tensor.source.type]
    blocks = raw.size // type_size
    per_row = next(size for size in (256, 64, 16, 4, 1) if blocks % size == 0)
    flat = np.ascontiguousarray(raw).reshape(blocks // per_row, per_row * type_size)
    try:
        with np.errstate(all="ignore"):  # damaged scales make infinities, which are for the model to show
            values = dequantize(flat, tensor.source.type)
    except NotImplementedError as error:
        raise ConfigError(
            f"{gguf.path}: tensor {tensor.source.name} is of type {tensor.source.type.name}, "
            "which cannot be dequantized"
        ) from error
    return np.ascontiguousarray(values, dtype="<f4").reshape(-1)
