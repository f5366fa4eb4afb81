"""Small valid models, whole down to their tokenizers, to be damaged."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from random import Random
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


_MODELS: tuple[dict[str, Any], ...] = (
    {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "end_of_word_suffix": "</w>",
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": True,
        "vocab": {
            "<unk>": 0,
            "a": 1,
            "##b": 2,
            "ab": 3,
            "<0x41>": 4,
            "c</w>": 5,
            "é": 6,
            "日本": 7,
            "##é": 8,
            "aé": 9,
        },
        "merges": [["a", "##b"], ["a", "##é"]],
    },
    {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [["<unk>", 0.0], ["a", -1.5], ["▁a", -2.0], ["<0x41>", -3.0], ["日本", -4.0], ["ab", -0.5]],
    },
    {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"<unk>": 0, "a": 1, "##b": 2, "日": 3},
    },
    {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "quick": 1, "fox": 2}},
)
_NORMALIZERS: tuple[dict[str, Any], ...] = (
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"},
    {"type": "Replace", "pattern": {"Regex": "(a|b)+c{1,3}"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"},
)
_PRE_TOKENIZERS: tuple[dict[str, Any], ...] = (
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+(?!\S)"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": "a"}, "behavior": "MergedWithPrevious", "invert": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    {"type": "CharDelimiterSplit", "delimiter": "x"},
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Contiguous"},
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
)
_TEMPLATE = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_POST_PROCESSORS: tuple[dict[str, Any], ...] = (
    {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
    {
        "type": "RobertaProcessing",
        "sep": ["</s>", 1],
        "cls": ["<s>", 0],
        "trim_offsets": True,
        "add_prefix_space": True,
    },
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    {
        "type": "TemplateProcessing",
        "single": _TEMPLATE,
        "pair": [*_TEMPLATE, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
)
_DECODERS: tuple[dict[str, Any], ...] = (
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "b"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)


def any_tokenizer(random: Random) -> dict[str, Any]:
    """A tokenizer.json of parts that can be put together, of every kind there is."""
    added = [
        {
            "id": 20 + index,
            "content": text,
            "single_word": random.random() < 0.5,
            "lstrip": random.random() < 0.5,
            "rstrip": random.random() < 0.5,
            "normalized": random.random() < 0.5,
            "special": random.random() < 0.5,
        }
        for index, text in enumerate(("<s>", "</s>", "fox", "é"))
    ]
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Left",
        "pad_to_multiple_of": 4,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    normalizers = random.sample(_NORMALIZERS, random.randrange(3))
    splits = random.sample(_PRE_TOKENIZERS, random.randrange(3))
    processors = random.sample(_POST_PROCESSORS, random.randrange(3))
    return deepcopy(
        {
            "version": "1.0",
            "truncation": random.choice((None, truncation)),
            "padding": random.choice((None, padding)),
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
            "post_processor": {"type": "Sequence", "processors": processors},
            "decoder": random.choice(_DECODERS),
            "model": random.choice(_MODELS),
        }
    )


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
