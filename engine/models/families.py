"""Which architectures are implemented: how each config.json is read, and what checkpoints call modules.

Importing this module imports no model and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.layers.expert_config import ExpertTensors
from engine.models.checkpoint_names import CheckpointNames, gate_then_up, qkv_by_group, qkv_in_turn
from engine.models.config import ModelConfig
from engine.models.heads import decoder_of, known_heads, refuse_bidirectional, with_head
from engine.models.not_supported import why_not
from engine.models.readers.baichuan import read_baichuan
from engine.models.readers.cohere import read_cohere, read_cohere2, read_stablelm
from engine.models.readers.eos import tokenizer_eos_token_id, turn_end_token_ids
from engine.models.readers.experts import read_gpt_oss, read_mixtral, read_qwen2_moe, read_qwen3_moe
from engine.models.readers.fields import ConfigFields
from engine.models.readers.gemma import read_gemma, read_gemma2, read_gemma3
from engine.models.readers.glm import read_chatglm, read_glm4
from engine.models.readers.llama import (
    read_granite,
    read_internlm2,
    read_llama,
    read_olmo2,
    read_qwen2,
    read_qwen3,
)
from engine.models.readers.phi3 import read_phi3
from engine.models.readers.qwen1 import read_qwen1
from engine.quant.config import Quantization
from engine.quant.readers.read import MXFP4, read_quantization
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import read_json_object

# Makes a configuration of: the fields of config.json, the architecture's name, and every file that may name
# tokens which end a completion (name -> its values). Raises ConfigError, as `load_model_config` does.
ReadConfig = Callable[[ConfigFields, str, Mapping[str, Mapping[str, Any]]], ModelConfig]


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures that are configured and named alike.

    Attributes:
        read_config: makes a ModelConfig of a config.json.
        names: what checkpoints call modules.
    """

    read_config: ReadConfig
    names: CheckpointNames


_LLAMA_NAMES = CheckpointNames(
    renamed={"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    # Old conversions saved the rotary frequencies, which are computed here.
    ignored=(".rotary_emb.inv_freq",),
)
_GEMMA_NAMES = CheckpointNames(
    renamed={
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)
_QWEN_MOE_NAMES = replace(_LLAMA_NAMES, renamed={**_LLAMA_NAMES.renamed, "mlp.router": "mlp.gate"})
_FUSED = {"qkv_proj": qkv_in_turn, "gate_up_proj": gate_then_up}
_LLAMA = Family(read_llama, _LLAMA_NAMES)
_BAICHUAN = Family(read_baichuan, replace(_LLAMA_NAMES, split={"W_pack": qkv_in_turn}))
_CHATGLM = Family(
    read_chatglm,
    CheckpointNames(
        renamed={
            "model.embed_tokens": "transformer.embedding.word_embeddings",
            "model.layers": "transformer.encoder.layers",
            "model.norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
            "self_attn": "self_attention",
            "self_attention.o_proj": "self_attention.dense",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        },
        split={"query_key_value": qkv_in_turn, "dense_h_to_4h": gate_then_up},
        ignored=(".rotary_pos_emb.inv_freq",),
    ),
)
_QWEN1 = Family(
    read_qwen1,
    CheckpointNames(
        renamed={
            "model.embed_tokens": "transformer.wte",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "self_attn": "attn",
            "attn.o_proj": "attn.c_proj",
            "mlp.gate_proj": "mlp.w2",
            "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
            "attn_norm": "ln_1",
            "mlp_norm": "ln_2",
        },
        split={"c_attn": qkv_in_turn},
        ignored=(".rotary_emb.inv_freq", ".attn.masked_bias"),
    ),
)
_STABLELM = Family(
    read_stablelm,
    replace(
        _LLAMA_NAMES,
        renamed={
            **_LLAMA_NAMES.renamed,
            "q_norm": "q_layernorm.norms",
            "k_norm": "k_layernorm.norms",
        },
        head_norms_are_split=True,
    ),
)
# By the name in config.json's `architectures`.
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "YiForCausalLM": Family(
        read_llama, replace(_LLAMA_NAMES, renamed={"attn_norm": "ln1", "mlp_norm": "ln2"})
    ),
    "InternLM2ForCausalLM": Family(
        read_internlm2,
        CheckpointNames(
            renamed={
                "model.embed_tokens": "model.tok_embeddings",
                "lm_head": "output",
                "self_attn": "attention",
                "attention.o_proj": "attention.wo",
                "mlp": "feed_forward",
                "gate_proj": "w1",
                "up_proj": "w3",
                "down_proj": "w2",
                "attn_norm": "attention_norm",
                "mlp_norm": "ffn_norm",
            },
            split={"wqkv": qkv_by_group},
        ),
    ),
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": Family(
        read_mixtral,
        CheckpointNames(
            renamed={
                **_LLAMA_NAMES.renamed,
                "mlp": "block_sparse_moe",
                "router": "gate",
                "gate_proj": "w1",
                "up_proj": "w3",
                "down_proj": "w2",
            }
        ),
    ),
    "Qwen2ForCausalLM": Family(read_qwen2, _LLAMA_NAMES),
    "Qwen2MoeForCausalLM": Family(read_qwen2_moe, _QWEN_MOE_NAMES),
    "Qwen3ForCausalLM": Family(read_qwen3, _LLAMA_NAMES),
    "Qwen3MoeForCausalLM": Family(read_qwen3_moe, _QWEN_MOE_NAMES),
    "GptOssForCausalLM": Family(
        read_gpt_oss,
        replace(_LLAMA_NAMES, experts=ExpertTensors(stacked=True, interleaved=True, transposed=True)),
    ),
    "QWenLMHeadModel": _QWEN1,
    "ChatGLMModel": _CHATGLM,
    "ChatGLMForConditionalGeneration": _CHATGLM,
    "GlmForCausalLM": Family(read_glm4, replace(_LLAMA_NAMES, split={"gate_up_proj": gate_then_up})),
    "Glm4ForCausalLM": Family(
        read_glm4,
        CheckpointNames(
            renamed={
                "attn_norm": "input_layernorm",
                "attn_out_norm": "post_self_attn_layernorm",
                "mlp_norm": "post_attention_layernorm",
                "mlp_out_norm": "post_mlp_layernorm",
            },
            split={"gate_up_proj": gate_then_up},
        ),
    ),
    "BaiChuanForCausalLM": _BAICHUAN,
    "BaichuanForCausalLM": _BAICHUAN,
    "GemmaForCausalLM": Family(read_gemma, _LLAMA_NAMES),
    "Gemma2ForCausalLM": Family(read_gemma2, _GEMMA_NAMES),
    "Gemma3ForCausalLM": Family(read_gemma3, _GEMMA_NAMES),
    "Gemma3ForConditionalGeneration": Family(
        read_gemma3,
        CheckpointNames(
            renamed={
                **_GEMMA_NAMES.renamed,
                "model": "language_model.model",
                "lm_head": "language_model.lm_head",
            },
            others=("vision_tower.", "multi_modal_projector."),
        ),
    ),
    "Phi3ForCausalLM": Family(read_phi3, replace(_LLAMA_NAMES, split=_FUSED)),
    "GraniteForCausalLM": Family(read_granite, _LLAMA_NAMES),
    "Olmo2ForCausalLM": Family(
        read_olmo2,
        CheckpointNames(
            renamed={
                "attn_out_norm": "post_attention_layernorm",
                "mlp_out_norm": "post_feedforward_layernorm",
            }
        ),
    ),
    "CohereForCausalLM": Family(read_cohere, _LLAMA_NAMES),
    "Cohere2ForCausalLM": Family(read_cohere2, _LLAMA_NAMES),
    "StableLmForCausalLM": _STABLELM,
    "StableLMEpochForCausalLM": _STABLELM,
}


def checkpoint_names(architecture: str) -> CheckpointNames:
    """What checkpoints of a supported architecture call modules."""
    return FAMILIES[architecture].names


def load_model_config(directory: Path, quantization: str = "auto") -> ModelConfig:
    """Reads config.json and, where they are, generation_config.json, the tokenizer's end of text and files
    that describe a quantization.

    Args:
        quantization: which one is wanted; see `read_quantization`.

    Raises:
        ConfigError: a file is missing or malformed, the architecture is unknown, or the model uses a
            feature that is not implemented. Nothing the model needs is ignored.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    config = parse_model_config(
        values,
        generation,
        source=str(path),
        generation_source=str(generation_path),
        directory=directory,
        quantization=quantization,
    )
    by_tokenizer = (
        tokenizer_eos_token_id(directory),
        *turn_end_token_ids(directory, str(values.get("model_type", ""))),
    )
    # What is beyond the model's vocabulary it never computes.
    further = [each for each in by_tokenizer if each is not None and 0 <= each < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *further))))


def parse_model_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    source: str,
    generation_source: str = "generation_config.json",
    directory: Path | None = None,
    quantization: str = "auto",
) -> ModelConfig:
    """The configuration in parsed JSON; the sources name it in errors. Raises as load_model_config.

    Args:
        directory, quantization: see `read_quantization`.
    """
    architecture = _architecture(values, source)
    eos_sources = {generation_source: generation, source: values}
    fields, decoder = ConfigFields(values, source), decoder_of(architecture)
    config = with_head(FAMILIES[decoder].read_config(fields, decoder, eos_sources), architecture, fields)
    quantized = read_quantization(values, source, directory=directory, wanted=quantization)
    _check_experts(config, quantized, source)
    return replace(config, quantization=quantized)


def _check_experts(config: ModelConfig, quantization: Quantization | None, source: str) -> None:
    """Raises ConfigError for experts that lie in one tensor and would be quantized as linear layers are, and
    for MXFP4 where no experts are of it."""
    formats = {layer.experts.weight_format for layer in config.layers if layer.experts is not None}
    if quantization is None:
        return
    if quantization.method == MXFP4 and MXFP4 not in formats:
        raise ConfigError(
            f"{source}: the weights are quantized as {MXFP4!r}; supported are gpt-oss's experts"
        )
    if quantization.method != MXFP4 and formats and checkpoint_names(config.architecture).experts.stacked:
        raise ConfigError(
            f"{source}: experts quantized as {quantization.method!r} are not supported for this "
            "architecture; supported are plain ones and MXFP4"
        )


def _architecture(values: Mapping[str, Any], source: str) -> str:
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"{source}: architectures is {architectures!r}; it must be a list of one name")
    architecture = str(architectures[0])
    refuse_bidirectional(architecture, ConfigFields(values, source))
    if decoder_of(architecture) not in FAMILIES:
        known = [*FAMILIES, *known_heads()]
        raise ConfigError(
            f"{source}: architecture {architecture!r} is not supported{why_not(architecture, known)}"
        )
    return architecture
