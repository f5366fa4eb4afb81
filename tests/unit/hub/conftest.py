"""Small GGUF files, made with the gguf package's own writer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16

BuildGguf = Callable[..., Path]


def train_tokenizer(pre_tokenizer: Any) -> Tokenizer:
    """A byte-level BPE trained on a little text, with two control tokens and a user-defined one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "The quick brown fox isn't 12345 years old; it's 678. Voilà: l'été, 北京!\n\n\tdef f(x):  return x"
    tokenizer.train_from_iterator([text] * 8, trainer)
    return tokenizer


def tiny_weights(vocab_size: int) -> dict[str, np.ndarray]:
    """All tensors of a small Llama under their GGUF names, in GGUF's row order."""
    random = np.random.default_rng(0)
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab_size, HIDDEN), "output_norm": (HIDDEN,)}
    for index in range(LAYERS):
        layer = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (query, HIDDEN),
            "attn_k": (key, HIDDEN),
            "attn_v": (key, HIDDEN),
            "attn_output": (HIDDEN, query),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


@functools.cache
def _read_into_plain_arrays(path: Path) -> gguf.GGUFReader:
    """The package's reader makes a million views of the file, each four times as costly of a memory map."""
    map_file = np.memmap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            np, "memmap", lambda *arguments, **named: map_file(*arguments, **named).view(np.ndarray)
        )
        return GGUFReader(path)


_name_tensors = functools.cache(gguf.get_tensor_name_map)


@pytest.fixture
def reading_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the gguf package, and transformers with it, read a file and list tensors once in a session.

    transformers does both again at every turn. Only for files that stay as they are.
    """
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: _read_into_plain_arrays(Path(path)))
    monkeypatch.setattr(gguf, "get_tensor_name_map", _name_tensors)


@pytest.fixture
def build_gguf(tmp_path: Path) -> BuildGguf:
    """Writes a small valid Llama GGUF. Keyword arguments change it:

    pre, tokenizer: name of the pre-tokenizer and the trained tokenizer; quantize: a type for all matrices;
    edit: called with the dictionary of tensors; metadata: extra keys for the writer, by name;
    architecture, tokenizer_model: as named.
    """

    def build(
        *,
        pre: str = "gpt-2",
        tokenizer: Tokenizer | None = None,
        quantize: GGMLQuantizationType = GGMLQuantizationType.F32,
        edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
        metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
        architecture: str = "llama",
        tokenizer_model: str = "gpt2",
        name: str = "tiny.gguf",
    ) -> Path:
        if tokenizer is None:
            tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        add_tokenizer(writer, tokenizer, pre, tokenizer_model)
        metadata(writer)
        tensors = tiny_weights(tokenizer.get_vocab_size())
        edit(tensors)
        for tensor_name, values in tensors.items():
            kind = quantize if values.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return build


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str, model: str) -> None:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    specials = {"<|begin|>", "<|end|>"}
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [TokenType.CONTROL if token in specials else TokenType.NORMAL for token, _ in vocab]
    )
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
