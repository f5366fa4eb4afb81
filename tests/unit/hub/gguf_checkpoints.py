"""Tiny checkpoints of every architecture, and what llama.cpp's converter makes of them.

Names are mapped by the table of the gguf package, and the rest is written from what that converter does, not
from our tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.integration.plain_families import write_plain
from tests.integration.tiny_families import SHAPE, VOCAB
from tests.unit.hub.conftest import add_tokenizer

F32 = GGMLQuantizationType.F32
Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]

_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "attention_factor": 1.25,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.02, 1.04, 1.06, 1.08, 1.1],
    "long_factor": [1.0, 1.7, 2.4, 3.1, 3.8, 4.5],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        arch: the architecture that GGUF gives it.
        model_type: transformers' name of it, or the name of one of PLAIN_FAMILIES.
        values: what differs from SHAPE, for transformers.
    """

    arch: MODEL_ARCH
    model_type: str
    values: Fields = field(default_factory=dict)

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


CASES = {
    "llama": Case(MODEL_ARCH.LLAMA, "llama", {"head_dim": 32}),
    "llama-biases": Case(MODEL_ARCH.LLAMA, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": Case(MODEL_ARCH.LLAMA, "llama", {"tie_word_embeddings": True}),
    "llama-linear": Case(MODEL_ARCH.LLAMA, "llama", {"rope_parameters": _LINEAR}),
    "llama-3.1": Case(MODEL_ARCH.LLAMA, "llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": Case(MODEL_ARCH.LLAMA, "llama", {"rope_parameters": _YARN}),
    "mistral": Case(MODEL_ARCH.LLAMA, "mistral", {"sliding_window": None, "head_dim": 32}),
    "mixtral": Case(MODEL_ARCH.LLAMA, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen": Case(MODEL_ARCH.QWEN, "qwen1"),
    "qwen2": Case(MODEL_ARCH.QWEN2, "qwen2", {"rope_parameters": _YARN}),
    "qwen3": Case(MODEL_ARCH.QWEN3, "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2moe": Case(MODEL_ARCH.QWEN2MOE, "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 160}),
    "qwen3moe": Case(MODEL_ARCH.QWEN3MOE, "qwen3_moe", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": Case(MODEL_ARCH.GEMMA, "gemma", {"head_dim": 32}),
    "gemma2": Case(
        MODEL_ARCH.GEMMA2,
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 11, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": Case(
        MODEL_ARCH.GEMMA3,
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 11,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "gemma3-pattern": Case(
        MODEL_ARCH.GEMMA3,
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _WINDOWS},
    ),
    "phi3": Case(MODEL_ARCH.PHI3, "phi3", {"sliding_window": 12}),
    "phi3-longrope": Case(
        MODEL_ARCH.PHI3,
        "phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Case(
        MODEL_ARCH.GRANITE,
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": Case(MODEL_ARCH.OLMO2, "olmo2"),
    "stablelm": Case(MODEL_ARCH.STABLELM, "stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm-parallel": Case(
        MODEL_ARCH.STABLELM, "stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}
    ),
    "stablelm-12b": Case(
        MODEL_ARCH.STABLELM,
        "stablelm",
        {"use_parallel_residual": True, "partial_rotary_factor": 0.25, "qk_layernorm": True},
    ),
    "command-r": Case(MODEL_ARCH.COMMAND_R, "cohere", {"logit_scale": 0.0625}),
    "command-r-plus": Case(MODEL_ARCH.COMMAND_R, "cohere", {"use_qk_norm": True}),
    "cohere2": Case(
        MODEL_ARCH.COHERE2, "cohere2", {"sliding_window": 11, "head_dim": 16, "num_hidden_layers": 5}
    ),
    "chatglm": Case(MODEL_ARCH.CHATGLM, "chatglm3"),
    "glm": Case(MODEL_ARCH.CHATGLM, "glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4": Case(MODEL_ARCH.GLM4, "glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "baichuan": Case(MODEL_ARCH.BAICHUAN, "baichuan-7b"),
    "gpt-oss": Case(
        MODEL_ARCH.GPT_OSS,
        "gpt_oss",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 11,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "truncate": False,
            },
        },
    ),
}
PLAIN = {"qwen1", "chatglm3", "baichuan-7b"}


def write_checkpoint(case: Case, directory: Path) -> tuple[Fields, Tensors]:
    """Writes a checkpoint in Hugging Face layout. Returns its config.json and its tensors.

    Weights are multiples of 2^-10, to which 1 can be added exactly.
    """
    directory.mkdir()
    if case.model_type in PLAIN:
        write_plain(case.model_type, directory, 64)
        config = json.loads((directory / "config.json").read_text())
        # GGUF does not hold what the first Qwen does beyond its context.
        limits = {"use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": 512}
        config |= limits if case.model_type == "qwen1" else {}
        (directory / "config.json").write_text(
            json.dumps({**config, "torch_dtype": "float32", "eos_token_id": 2})
        )
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        values = {**SHAPE, **case.values}
        made = AutoConfig.for_model(case.model_type, **values)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randint(-512, 512, parameter.shape) / 1024)
        model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    if case.model_type == "gpt_oss":
        _pack_experts(tensors)
        config["quantization_config"] = {"quant_method": "mxfp4"}
        (directory / "config.json").write_text(json.dumps(config))
    return config, {name: values for name, values in tensors.items() if not name.endswith("inv_freq")}


def _pack_experts(tensors: Tensors) -> None:
    """Random MXFP4 in the place of gpt-oss's experts, as it is published."""
    random = np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, features, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = random.integers(0, 256, (experts, out, features // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = random.integers(118, 126, (experts, out, features // 32), np.uint8)


def write_gguf(
    case: Case,
    config: Fields,
    tensors: Tensors,
    path: Path,
    *,
    kind: GGMLQuantizationType = F32,
    edit: Callable[[gguf.GGUFWriter, Tensors], None] = lambda writer, tensors: None,
) -> None:
    """Writes what llama.cpp's converter makes of a checkpoint.

    Args:
        kind: the number format of matrices.
        edit: changes keys and tensors before they are written.
    """
    writer = gguf.GGUFWriter(path, case.name)
    _add_keys(writer, case, config)
    add_tokenizer(writer, _tokenizer(), "gpt-2", "gpt2")
    for name, token_id in (("bos", 1), ("eos", 2), ("padding", 0)):
        writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    converted = _convert(case, config, tensors)
    edit(writer, converted)
    for name, values in converted.items():
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.MXFP4)
        else:
            used = kind if values.ndim > 1 else F32
            writer.add_tensor(name, gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer() -> Tokenizer:
    """One of VOCAB tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<|begin|>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog, twice, and rests."] * 2, trainer
    )
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def _first(config: Fields, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _add_keys(writer: gguf.GGUFWriter, case: Case, config: Fields) -> None:
    """The keys of most architectures; some have fewer, which reading must not mind."""
    writer.add_block_count(_first(config, "num_hidden_layers", "num_layers"))
    context = ("seq_length",) if case.name == "chatglm" else ("max_position_embeddings", "model_max_length")
    writer.add_context_length(_first(config, *context) or 256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(_first(config, "intermediate_size", "ffn_hidden_size"))
    heads = config["num_attention_heads"]
    writer.add_head_count(heads)
    kv_heads = _first(config, "num_key_value_heads", "multi_query_group_num")
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim")
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rms = _first(config, "rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon")
    if rms is not None:
        writer.add_layer_norm_rms_eps(rms)
    if config.get("layer_norm_eps") is not None:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    rope = config.get("rope_parameters") or {}
    _add_rope(writer, case, config, rope)
    part = _first(config, "partial_rotary_factor") or rope.get("partial_rotary_factor", 1.0)
    part = 0.5 if case.name == "chatglm" else part
    writer.add_rope_dimension_count(int((head_dim or config["hidden_size"] // heads) * part))
    experts = _first(config, "num_local_experts", "num_experts")
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for name, add in _OWN_KEYS.items():
        if config.get(name) is not None:
            add(writer, config[name])
    if case.name == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if case.name == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if case.name == "gemma3" and len(config["layer_types"]) == 3:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


_OWN_KEYS: dict[str, Callable[[gguf.GGUFWriter, Any], None]] = {
    "moe_intermediate_size": gguf.GGUFWriter.add_expert_feed_forward_length,
    "shared_expert_intermediate_size": gguf.GGUFWriter.add_expert_shared_feed_forward_length,
    "attn_logit_softcapping": gguf.GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": gguf.GGUFWriter.add_final_logit_softcapping,
    "embedding_multiplier": gguf.GGUFWriter.add_embedding_scale,
    "residual_multiplier": gguf.GGUFWriter.add_residual_scale,
    "attention_multiplier": gguf.GGUFWriter.add_attention_scale,
    "logits_scaling": gguf.GGUFWriter.add_logit_scale,
    "logit_scale": gguf.GGUFWriter.add_logit_scale,
    "use_parallel_residual": lambda writer, _: writer.add_parallel_residual(True),  # as old converters said
}


def _add_rope(writer: gguf.GGUFWriter, case: Case, config: Fields, rope: Fields) -> None:
    if case.name in ("gemma2", "gemma3", "cohere2", "gpt-oss"):
        writer.add_sliding_window(config["sliding_window"])
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or config.get("rotary_emb_base") or 10000 * config.get("rope_ratio", 1)
    if case.name not in ("gemma", "gemma2", "baichuan"):
        writer.add_rope_freq_base(theta)
    if local is not None and case.name == "gemma3":
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if case.name == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            stretch = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))


def _convert(case: Case, config: Fields, tensors: Tensors) -> Tensors:
    layers = _first(config, "num_hidden_layers", "num_layers")
    names = gguf.get_tensor_name_map(case.arch, layers)
    converted: Tensors = {}
    for name, values in _stack_heads(_stack_experts(_unpack(_split_packed(tensors)))):
        values = _permute(case, config, name, values)
        if case.name in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        mapped = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        mapped = mapped or names.get_name(name, (".weight", ".bias"))
        assert mapped is not None, name
        converted[mapped] = values.squeeze() if "shexp" in mapped else values
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        converted["rope_freqs.weight"] = _llama3_divisors(config, rope)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            converted[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], np.float32)
    return converted


def _split_packed(tensors: Tensors) -> Iterable[tuple[str, np.ndarray]]:
    """gpt-oss's gate and up, whose rows alternate, are taken apart, and MXFP4 gets the order of ggml: each
    group's exponent and 16 bytes, of which byte i holds the values i and i + 16."""
    for name, values in tensors.items():
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            codes = np.stack((values & 15, values >> 4), axis=-1).reshape(*values.shape[:-1], 32)
            halves = codes[..., :16] | codes[..., 16:] << 4
            exponents = tensors[name.replace("_blocks", "_scales")][..., None]
            values = np.concatenate((exponents, halves), axis=-1)
            values = values.reshape(*values.shape[:2], -1)
        name = re.sub(r"(gate_up|down)_proj_(blocks|bias)", r"\1_proj.\2", name).replace(".blocks", ".weight")
        if "experts.gate_up_proj" in name:
            yield name.replace("gate_up", "gate"), np.ascontiguousarray(values[:, ::2])
            yield name.replace("gate_up", "up"), np.ascontiguousarray(values[:, 1::2])
        else:
            yield name + (".weight" if name.endswith("sinks") else ""), values


def _unpack(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterable[tuple[str, np.ndarray]]:
    """Baichuan's queries, keys and values are taken apart."""
    for name, values in tensors:
        if "W_pack" in name:
            for part, piece in zip("qkv", np.split(values, 3), strict=True):
                yield name.replace("W_pack", f"{part}_proj"), piece
        else:
            yield name, values


def _stack_experts(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterable[tuple[str, np.ndarray]]:
    stacks: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, values in tensors:
        found = re.fullmatch(r"(.*\.experts\.)([0-9]+)\.(.*)", name)
        if found is None:
            yield name, values
        else:
            stacks.setdefault(found[1] + found[3], []).append((int(found[2]), values))
    for name, experts in stacks.items():
        merged = name.replace("model.layers", "layers") if "block_sparse_moe" in name else name
        merged = merged.replace("block_sparse_moe", "feed_forward")
        yield merged, np.stack([values for _, values in sorted(experts, key=lambda entry: entry[0])])


def _stack_heads(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterable[tuple[str, np.ndarray]]:
    """The norms of StableLM's heads become one tensor."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors:
        found = re.fullmatch(r"(.*_layernorm)\.norms\.([0-9]+)(\.weight)", name)
        if found is None:
            yield name, values
        else:
            stacks.setdefault(found[1] + found[3], {})[int(found[2])] = values
    for name, heads in stacks.items():
        yield name, np.stack([heads[head] for head in range(len(heads))])


def _permute(case: Case, config: Fields, name: str, values: np.ndarray) -> np.ndarray:
    if case.name not in ("llama", "granite", "baichuan") or not re.search(r"[qk]_proj\.(weight|bias)$", name):
        return values
    heads = config["num_attention_heads"]
    if "k_proj" in name:
        heads = config.get("num_key_value_heads") or heads
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _llama3_divisors(config: Fields, rope: Fields) -> np.ndarray:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    divisors = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / dim)
        original, low, high = 8192, rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def stems(arch: MODEL_ARCH) -> set[str]:
    """The names that the gguf package knows of an architecture's tensors, without "blk.N."."""
    known: list[MODEL_TENSOR] = gguf.MODEL_TENSORS[arch]
    return {TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in known}
