"""What each family has in config.json besides Llama's fields, from the keys of a GGUF file.

Some fields are in no key: they are the same in every release of the family, or follow from a size, as in
llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pagewire.hub.gguf.keys import LARGEST, ModelKeys, ModelSizes

Fields = dict[str, Any]
# Makes a family's config.json of: the file's keys, the sizes that they give, and Llama's fields. Raises
# ConfigError where the file asks for what the family does not have.
AddFields = Callable[[ModelKeys, ModelSizes, Fields], Fields]

HEAD_NORM = "blk.0.attn_q_norm.weight"
"""Is there where families that may normalise queries and keys do so."""
_WINDOW, _FULL = "sliding_attention", "full_attention"
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_BAICHUAN_13B_LAYERS = 40


def llama(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Llama, and Mistral without its window, which GGUF does not hold."""
    return fields


def mixtral(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Mixtral, which GGUF calls llama."""
    experts = {"num_local_experts": sizes.experts, "num_experts_per_tok": _experts_per_token(keys, sizes)}
    return {**fields, **experts, "sliding_window": None}


def qwen1(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """The first Qwen. What it does beyond the context that it was trained on is in no key, and is left
    out."""
    _refuse_scaling(keys, fields)
    if sizes.inner % 2:
        raise keys.error(f"{keys.key('feed_forward_length')} is {sizes.inner}; it must be even")
    return _renamed(
        fields,
        {"rms_norm_eps": "layer_norm_epsilon", "rope_theta": "rotary_emb_base", "head_dim": "kv_channels"},
        {
            "seq_length": sizes.context,
            "rotary_pct": 1.0,
            "no_bias": True,
            "use_dynamic_ntk": False,
            "use_logn_attn": False,
        },
    )


def qwen2(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Qwen 1.5 to 3. Their windows are switched off in every release."""
    return {**fields, "use_sliding_window": False}


def qwen2moe(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Qwen 1.5 and 2 with experts."""
    shared = {"shared_expert_intermediate_size": sizes.shared_inner}
    return {**qwen2(keys, sizes, fields), **_qwen_experts(keys, sizes, normalised=False), **shared}


def qwen3moe(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Qwen 3 with experts."""
    return {**qwen2(keys, sizes, fields), **_qwen_experts(keys, sizes, normalised=True)}


def gemma(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Gemma 1."""
    activation = "gelu_pytorch_tanh"
    return {**fields, "hidden_act": activation, "hidden_activation": activation}


def gemma2(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Gemma 2: every other layer has a window."""
    is_27b = sizes.layers == _GEMMA2_27B_LAYERS
    return {
        **gemma(keys, sizes, fields),
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if is_27b else sizes.head_dim,
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, sizes, every=2),
    }


def gemma3(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Gemma 3: every sixth layer sees all of its context, the others have a window and rotate by another
    base, unscaled."""
    is_27b = sizes.layers == _GEMMA3_27B_LAYERS
    has_windows = "attention.sliding_window" in keys
    cap = keys.number("final_logit_softcapping") if "final_logit_softcapping" in keys else None
    return {
        **gemma(keys, sizes, fields),
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if is_27b else sizes.head_dim,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": cap,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, sizes, every=6 if has_windows else 1),
    }


def phi3(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Phi-3 and Phi-4. A window of 0 is none."""
    window = keys.gguf.optional(keys.key("attention.sliding_window"), int, 0)
    if not 0 <= window <= LARGEST["attention.sliding_window"]:
        raise keys.error(f"{keys.key('attention.sliding_window')} is {window}; it must be a number of tokens")
    original = keys.count("rope.scaling.original_context_length", sizes.context)
    return {
        **fields,
        "partial_rotary_factor": _rotated_part(sizes),
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }


def granite(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Granite 3. That a model does not rotate is said by a key that means nothing elsewhere."""
    if not keys.flag("rope.scaling.finetuned", True):
        raise keys.error("is a Granite model without rotation, which is not implemented")
    return {
        **fields,
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", sizes.head_dim**-0.5),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


def olmo2(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """OLMo 2. OLMo 3 has the same name in GGUF, and windows."""
    if "attention.sliding_window" in keys and _WINDOW in _layer_types(keys, sizes, every=4):
        raise keys.error("has sliding windows, as OLMo 3 has them; only OLMo 2 can be converted")
    return fields


def stablelm(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """StableLM. Whether its parts run side by side is told by its norms: old files say that they do,
    wrongly."""
    return {
        **_layer_norm(fields),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in keys.gguf.tensors,
        "qk_layernorm": HEAD_NORM in keys.gguf.tensors,
        "partial_rotary_factor": _rotated_part(sizes),
    }


def cohere(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Command R and R+."""
    return {
        **_layer_norm(fields),
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": HEAD_NORM in keys.gguf.tensors,
    }


def cohere2(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Command R7B: every fourth layer sees all of its context, unrotated."""
    return {
        **_layer_norm(fields),
        "logit_scale": keys.number("logit_scale"),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, sizes, every=4),
    }


def chatglm(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """ChatGLM2, ChatGLM3 and GLM-4, in the form of their own code."""
    _refuse_scaling(keys, fields)
    if 2 * sizes.rotated != sizes.head_dim:
        raise keys.error(
            f"rotates {sizes.rotated} of {sizes.head_dim} dimensions of a head; ChatGLM rotates half"
        )
    names = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
    }
    own = {
        "padded_vocab_size": sizes.vocab,
        "rope_ratio": fields["rope_theta"] / 10000.0,
        "multi_query_attention": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
    }
    return _renamed(fields, names, own)


def glm(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """GLM-4 in transformers' form."""
    if "rope.dimension_sections" in keys:
        raise keys.error(
            "rotates by positions in an image, as GLM-4V does; only text models can be converted"
        )
    return {**fields, "partial_rotary_factor": _rotated_part(sizes)}


def baichuan(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """Baichuan 1 and 2. That of 13B, which no key names, does not rotate; it is the one of 40 layers."""
    if sizes.layers == _BAICHUAN_13B_LAYERS:
        return _renamed(fields, {"max_position_embeddings": "model_max_length"}, {})
    return fields


def gpt_oss(keys: ModelKeys, sizes: ModelSizes, fields: Fields) -> Fields:
    """gpt-oss: every other layer has a window. Its experts stay in MXFP4."""
    scaling = fields["rope_scaling"]
    if scaling is not None:
        scaling = {**scaling, "truncate": False}
    return {
        **fields,
        "rope_scaling": scaling,
        "intermediate_size": sizes.expert_inner,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": _experts_per_token(keys, sizes),
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, sizes, every=2),
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def _renamed(fields: Fields, names: dict[str, str], own: Fields) -> Fields:
    """The fields under a family's own names, and what it has besides."""
    return {**{names.get(name, name): value for name, value in fields.items()}, **own}


def _layer_norm(fields: Fields) -> Fields:
    return {"layer_norm_eps" if name == "rms_norm_eps" else name: value for name, value in fields.items()}


def _rotated_part(sizes: ModelSizes) -> float:
    """The share that gives exactly the rotated dimensions where a reader multiplies and truncates."""
    part = sizes.rotated / sizes.head_dim
    return part if int(sizes.head_dim * part) == sizes.rotated else math.nextafter(part, 1.0)


def _refuse_scaling(keys: ModelKeys, fields: Fields) -> None:
    if fields["rope_scaling"] is not None:
        raise keys.error(f"has RoPE scaling, which {keys.architecture} does not have")


def _experts_per_token(keys: ModelKeys, sizes: ModelSizes) -> int:
    used = keys.count("expert_used_count")
    if used > sizes.experts:
        raise keys.error(f"a token goes to {used} of {sizes.experts} experts; there must be as many")
    return used


def _qwen_experts(keys: ModelKeys, sizes: ModelSizes, *, normalised: bool) -> Fields:
    """
    Args:
        normalised: whether the weights of the chosen experts add up to 1 where the file does not say.
    """
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": _experts_per_token(keys, sizes),
        "moe_intermediate_size": sizes.expert_inner,
        "norm_topk_prob": keys.flag("expert_weights_norm", normalised),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _layer_types(keys: ModelKeys, sizes: ModelSizes, *, every: int) -> list[str]:
    """Which layers have a window, as `layer_types` has it: as the file says, in one of two forms, or all but
    each `every`th."""
    name = keys.key("attention.sliding_window_pattern")
    pattern = keys.gguf.metadata.get(name, every)
    if isinstance(pattern, list):
        if len(pattern) != sizes.layers or not all(value in (0, 1) for value in pattern):
            raise keys.error(f"{name} must have a truth value for each of the {sizes.layers} layers")
        return [_WINDOW if value else _FULL for value in pattern]
    if type(pattern) is not int or not 0 < pattern <= LARGEST["block_count"]:
        raise keys.error(f"{name} must be a number of layers from 1 to {LARGEST['block_count']}, or a list")
    return [_FULL if (layer + 1) % pattern == 0 else _WINDOW for layer in range(sizes.layers)]
