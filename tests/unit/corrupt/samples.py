"""Small valid models, whole down to their tokenizers, to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tests.unit.engine.tiny_model import CONFIG, write_model
from tests.unit.hub.conftest import (
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    add_tokenizer,
    tiny_weights,
    train_tokenizer,
)
from tests.unit.text.conftest import LLAMA_DECODER, sentencepiece_tokenizer

GENERATION: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 100,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 256,
    "bos_token": "<|begin|>",
    "eos_token": {"content": "<|end|>", "special": True},
    "added_tokens_decoder": {"0": {"content": "<|begin|>", "special": True}},
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def write_directory(directory: Path, *, shards: int = 1, sentencepiece: bool = False) -> Path:
    """A model directory in Hugging Face layout with everything that is read from one."""
    tokenizer = sentencepiece_tokenizer(LLAMA_DECODER) if sentencepiece else _byte_level()
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    extra = {"rope_scaling": ROPE, "sliding_window": None, "torch_dtype": "float32", "model_type": "llama"}
    write_model(directory, shards=shards, vocab_size=vocab_size, **extra)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    assert CONFIG["hidden_size"] == 32
    return directory


def _byte_level() -> Tokenizer:
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return tokenizer


def write_gguf(path: Path) -> Path:
    """A Llama of two layers as GGUF, half a megabyte."""
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TOKENIZER_CONFIG["chat_template"])
    add_tokenizer(writer, tokenizer, "gpt-2", "gpt2")
    for name, values in tiny_weights(tokenizer.get_vocab_size()).items():
        kind = GGMLQuantizationType.Q8_0 if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
