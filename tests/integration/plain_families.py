"""Families that transformers does not have: tiny random checkpoints in the layout of their files, and what
plain torch, written from the families' own descriptions, makes of a sequence. In fp64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB = 301
HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 64, 3, 4, 16, 96
Weights = dict[str, torch.Tensor]
Logits = Callable[[Weights, dict[str, Any], list[int], int], torch.Tensor]


def _random(shapes: dict[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.2
        is_norm = len(shape) == 1 and not name.endswith("bias")
        weights[name] = values + 1.0 if is_norm else values
    return weights


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """[T, heads, D] each -> [T, heads * D]."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + bias
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def _angles(length: int, dim: int, base: float) -> torch.Tensor:
    """[length, dim / 2]."""
    return torch.arange(length)[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)


def _rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Channel i of [T, heads, D] pairs with i + D / 2."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Channel 2i of [T, heads, D] pairs with 2i + 1."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


QWEN1 = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": HEAD_DIM,
    "intermediate_size": 2 * FFN,
    "seq_length": 64,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
# The names of the first release.
QWEN1_OLD = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "padded_vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "kv_channels": HEAD_DIM,
    "ffn_hidden_size": 2 * FFN,
    "seq_length": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "tie_word_embeddings": False,
}


def _qwen1_weights(config: dict[str, Any]) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        h = f"transformer.h.{i}"
        shapes |= {
            f"{h}.ln_1.weight": (HIDDEN,),
            f"{h}.ln_2.weight": (HIDDEN,),
            f"{h}.attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            f"{h}.attn.c_attn.bias": (3 * HIDDEN,),
            f"{h}.attn.c_proj.weight": (HIDDEN, HIDDEN),
            f"{h}.mlp.w1.weight": (FFN, HIDDEN),
            f"{h}.mlp.w2.weight": (FFN, HIDDEN),
            f"{h}.mlp.c_proj.weight": (HIDDEN, FFN),
        }
    return _random(shapes)


def _qwen1_logits(weights: Weights, config: dict[str, Any], ids: list[int], served: int) -> torch.Tensor:
    trained, base = config["seq_length"], float(config["rotary_emb_base"])
    if config.get("use_dynamic_ntk") and served > trained:
        alpha = max(2 ** math.ceil(math.log2(served / trained) + 1) - 1, 1)
        base *= alpha ** (HEAD_DIM / (HEAD_DIM - 2))
    angles = _angles(len(ids), HEAD_DIM, base)
    stretch = torch.ones(len(ids), 1, 1).double()
    if config.get("use_logn_attn"):
        for position in range(len(ids)):
            if position + 1 > trained:
                stretch[position] = math.log(position + 1, trained)
    x = weights["transformer.wte.weight"][ids]
    for i in range(LAYERS):
        h = f"transformer.h.{i}"
        normed = _rms(x, weights[f"{h}.ln_1.weight"], 1e-6)
        mixed = normed @ weights[f"{h}.attn.c_attn.weight"].T + weights[f"{h}.attn.c_attn.bias"]
        q, k, v = (each.unflatten(1, (HEADS, HEAD_DIM)) for each in mixed.split(HIDDEN, 1))
        q, k = _rotate_halves(q, angles) * stretch, _rotate_halves(k, angles)
        x = x + _attend(q, k, v) @ weights[f"{h}.attn.c_proj.weight"].T
        normed = _rms(x, weights[f"{h}.ln_2.weight"], 1e-6)
        up, gate = (normed @ weights[f"{h}.mlp.{name}.weight"].T for name in ("w1", "w2"))
        x = x + (up * F.silu(gate)) @ weights[f"{h}.mlp.c_proj.weight"].T
    return _rms(x, weights["transformer.ln_f.weight"], 1e-6) @ weights["lm_head.weight"].T


CHATGLM3 = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": VOCAB,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": HEAD_DIM,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": FFN,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "rope_ratio": 3,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def _chatglm3_weights(config: dict[str, Any]) -> Weights:
    width = (HEADS + 2 * 2) * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (VOCAB, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (HEAD_DIM // 4,),
    }
    for i in range(LAYERS):
        layer = f"transformer.encoder.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attention.query_key_value.weight": (width, HIDDEN),
            f"{layer}.self_attention.query_key_value.bias": (width,),
            f"{layer}.self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN),
            f"{layer}.mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
        }
    return _random(shapes)


def _chatglm3_logits(weights: Weights, config: dict[str, Any], ids: list[int], served: int) -> torch.Tensor:
    angles = _angles(len(ids), HEAD_DIM // 2, 10000.0 * config["rope_ratio"])

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        turned, kept = heads.chunk(2, -1)
        return torch.cat((_rotate_pairs(turned, angles), kept), -1)

    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(LAYERS):
        layer = f"transformer.encoder.layers.{i}"
        normed = _rms(x, weights[f"{layer}.input_layernorm.weight"], 1e-5)
        attention = f"{layer}.self_attention"
        mixed = normed @ weights[f"{attention}.query_key_value.weight"].T
        mixed = mixed + weights[f"{attention}.query_key_value.bias"]
        sizes = (HEADS * HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM)
        q, k, v = (each.unflatten(1, (-1, HEAD_DIM)) for each in mixed.split(sizes, 1))
        x = x + _attend(rotate(q), rotate(k), v) @ weights[f"{attention}.dense.weight"].T
        normed = _rms(x, weights[f"{layer}.post_attention_layernorm.weight"], 1e-5)
        gate, up = (normed @ weights[f"{layer}.mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weights[f"{layer}.mlp.dense_4h_to_h.weight"].T
    x = _rms(x, weights["transformer.encoder.final_layernorm.weight"], 1e-5)
    return x @ weights["transformer.output_layer.weight"].T


BAICHUAN_7B = {
    "architectures": ["BaiChuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
BAICHUAN2_7B = {
    **BAICHUAN_7B,
    "architectures": ["BaichuanForCausalLM"],
    "vocab_size": 125696,
    "hidden_size": 32,
}
BAICHUAN_13B = {
    **{name: value for name, value in BAICHUAN_7B.items() if name != "max_position_embeddings"},
    "architectures": ["BaichuanForCausalLM"],
    "num_attention_heads": 6,
    "hidden_size": 96,
    "model_max_length": 256,
}


def _baichuan_weights(config: dict[str, Any]) -> Weights:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.W_pack.weight": (3 * hidden, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (FFN, hidden),
            f"{layer}.mlp.up_proj.weight": (FFN, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, FFN),
        }
    return _random(shapes)


def _alibi_bias(heads: int, length: int) -> torch.Tensor:
    """[heads, length, length]. For six heads: four powers of 2^-2, and two of 2^-1 between them."""
    assert heads == 6
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]).double()
    positions = torch.arange(length)
    return slopes[:, None, None] * (positions[None, :] - positions[:, None])


def _baichuan_logits(weights: Weights, config: dict[str, Any], ids: list[int], served: int) -> torch.Tensor:
    heads = config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    has_alibi = "max_position_embeddings" not in config
    angles = _angles(len(ids), dim, 10000.0)
    bias = _alibi_bias(heads, len(ids)) if has_alibi else 0.0
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        normed = _rms(x, weights[f"{layer}.input_layernorm.weight"], 1e-6)
        mixed = normed @ weights[f"{layer}.self_attn.W_pack.weight"].T
        q, k, v = (each.unflatten(1, (heads, dim)) for each in mixed.chunk(3, 1))
        if not has_alibi:
            q, k = _rotate_halves(q, angles), _rotate_halves(k, angles)
        x = x + _attend(q, k, v, bias) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        normed = _rms(x, weights[f"{layer}.post_attention_layernorm.weight"], 1e-6)
        gate, up = (normed @ weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    if config["vocab_size"] == 125696:  # NormHead
        head = head / head.norm(dim=1, keepdim=True)
    return _rms(x, weights["model.norm.weight"], 1e-6) @ head.T


@dataclass(frozen=True)
class PlainFamily:
    """A family's config.json, weights, and computation."""

    config: dict[str, Any]
    weights: Callable[[dict[str, Any]], Weights]
    logits: Logits


PLAIN_FAMILIES = {
    "qwen1": PlainFamily(QWEN1, _qwen1_weights, _qwen1_logits),
    "qwen1-old": PlainFamily(QWEN1_OLD, _qwen1_weights, _qwen1_logits),
    "chatglm3": PlainFamily(CHATGLM3, _chatglm3_weights, _chatglm3_logits),
    "baichuan-7b": PlainFamily(BAICHUAN_7B, _baichuan_weights, _baichuan_logits),
    "baichuan2-7b": PlainFamily(BAICHUAN2_7B, _baichuan_weights, _baichuan_logits),
    "baichuan-13b": PlainFamily(BAICHUAN_13B, _baichuan_weights, _baichuan_logits),
}


def write_plain(case: str, directory: Path, served: int) -> Callable[[list[int]], torch.Tensor]:
    """Writes a checkpoint. Returns what computes a sequence's logits, [tokens, vocabulary], where contexts of
    up to `served` tokens are served."""
    family = PLAIN_FAMILIES[case]
    (directory / "config.json").write_text(json.dumps(family.config))
    weights = family.weights(family.config)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    exact = {name: tensor.double() for name, tensor in weights.items()}
    return lambda ids: family.logits(exact, family.config, ids, served)
