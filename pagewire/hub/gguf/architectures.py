"""Which architectures of GGUF files can be converted, and what each of them calls and stores.

A row says what llama.cpp's converter made of a Hugging Face checkpoint: the name of each tensor, the rows
that it permuted, what it added. It says nothing about number formats, so it holds for blocks that stay
quantized, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf import families as families
from pagewire.hub.gguf.families import AddFields
from pagewire.hub.gguf.reader import GgufFile

ALWAYS = ""
_OUTER = {
    "token_embd": "model.embed_tokens",  # nosec B105 # no password
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one architecture's GGUF files correspond to a Hugging Face checkpoint.

    Tensors have their GGUF names here without "blk.N." and ".weight" or ".bias", such as "attn_q"; modules
    have their Hugging Face names, those of a layer without "model.layers.N.".

    Attributes:
        class_name, model_type: config.json's `architectures` and `model_type`.
        add_fields: makes config.json of Llama's fields.
        outer: tensor -> module, outside the layers. The output projection may be missing (tied to the
            embedding).
        layers: what the modules of layers begin with.
        layer: tensor -> module, of a layer.
        fused: module -> the tensors that it holds, one after another along its rows.
        experts: tensor -> module with "{expert}" in its name, of a layer's experts.
        experts_are_apart: whether each expert has tensors of its own, such as "ffn_gate.3"; else one tensor
            has three dimensions, the first of which is the expert.
        head_norms: tensor -> module with "{head}" in its name, of norms that have a tensor for each head.
        packed: module -> tensors of its layer's experts in MXFP4, which stay so; the rows of several
        alternate. biases: the field of config.json that switches biases on -> the tensors that then have one,
            of which the first of layer 0 shows whether it is so. Those of ALWAYS have one in every file.
        permuted: tensors whose rows are in the order of rotated pairs: of the rows (j, i) of a head, j < 2, i
            < head_dim / 2, GGUF stores row (i, j).
        one_plus_norms: whether norms are stored as 1 + weight.
        partial_rotary: whether a part of a head's dimensions may be left unrotated.
        shapes: tensor -> the names of its sizes (attributes of ModelSizes), where it is not the usual.
    """

    class_name: str
    model_type: str
    add_fields: AddFields = families.llama
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    layers: str = "model.layers"
    layer: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    experts_are_apart: bool = False
    head_norms: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    permuted: tuple[str, ...] = ()
    one_plus_norms: bool = False
    partial_rotary: bool = False
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_ATTENTION = {**_QKV, "attn_output": "self_attn.o_proj"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_MLP_SHAPES = {"ffn_up": ("twice_inner", "hidden")}
_ROTATED = ("attn_q", "attn_k")
_ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")

LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    model_type="llama",
    layer={**_NORMS, **_ATTENTION, **_MLP},
    biases={"attention_bias": _ATTENTION_BIASES, "mlp_bias": ("ffn_up", "ffn_gate", "ffn_down")},
    permuted=_ROTATED,
)
MIXTRAL = Architecture(
    class_name="MixtralForCausalLM",
    model_type="mixtral",
    add_fields=families.mixtral,
    layer={**_NORMS, **_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate": "block_sparse_moe.experts.{expert}.w1",
        "ffn_down": "block_sparse_moe.experts.{expert}.w2",
        "ffn_up": "block_sparse_moe.experts.{expert}.w3",
    },
    permuted=_ROTATED,
)
QWEN1 = Architecture(
    class_name="QWenLMHeadModel",
    model_type="qwen",
    add_fields=families.qwen1,
    outer={
        "token_embd": "transformer.wte",  # nosec B105 # no password
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layers="transformer.h",
    layer={
        "attn_norm": "ln_1",
        "ffn_norm": "ln_2",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_up": "mlp.w1",
        "ffn_gate": "mlp.w2",
        "ffn_down": "mlp.c_proj",
    },
    biases={ALWAYS: ("attn_qkv",)},
    shapes={
        "ffn_up": ("half_inner", "hidden"),
        "ffn_gate": ("half_inner", "hidden"),
        "ffn_down": ("hidden", "half_inner"),
    },
)
QWEN2 = Architecture(
    class_name="Qwen2ForCausalLM",
    model_type="qwen2",
    add_fields=families.qwen2,
    layer={**_NORMS, **_ATTENTION, **_MLP},
    biases={ALWAYS: ("attn_q", "attn_k", "attn_v")},
)
QWEN3 = Architecture(
    class_name="Qwen3ForCausalLM",
    model_type="qwen3",
    add_fields=families.qwen2,
    layer={**_NORMS, **_ATTENTION, **_QK_NORMS, **_MLP},
    biases={"attention_bias": _ATTENTION_BIASES},
)
_QWEN_EXPERTS = {
    "ffn_gate": "mlp.experts.{expert}.gate_proj",
    "ffn_down": "mlp.experts.{expert}.down_proj",
    "ffn_up": "mlp.experts.{expert}.up_proj",
}
QWEN2MOE = Architecture(
    class_name="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    add_fields=families.qwen2moe,
    layer={
        **_NORMS,
        **_ATTENTION,
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    experts=_QWEN_EXPERTS,
    biases={ALWAYS: ("attn_q", "attn_k", "attn_v")},
)
QWEN3MOE = Architecture(
    class_name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    add_fields=families.qwen3moe,
    layer={**_NORMS, **_ATTENTION, **_QK_NORMS, "ffn_gate_inp": "mlp.gate"},
    experts=_QWEN_EXPERTS,
    biases={"attention_bias": _ATTENTION_BIASES},
)
GEMMA = Architecture(
    class_name="GemmaForCausalLM",
    model_type="gemma",
    add_fields=families.gemma,
    layer={**_NORMS, **_ATTENTION, **_MLP},
    one_plus_norms=True,
)
GEMMA2 = Architecture(
    class_name="Gemma2ForCausalLM",
    model_type="gemma2",
    add_fields=families.gemma2,
    layer={**_GEMMA_NORMS, **_ATTENTION, **_MLP},
    one_plus_norms=True,
)
GEMMA3 = Architecture(
    class_name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    add_fields=families.gemma3,
    layer={**_GEMMA_NORMS, **_ATTENTION, **_QK_NORMS, **_MLP},
    one_plus_norms=True,
)
PHI3 = Architecture(
    class_name="Phi3ForCausalLM",
    model_type="phi3",
    add_fields=families.phi3,
    layer={
        **_NORMS,
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        **_FUSED_MLP,
    },
    partial_rotary=True,
    shapes=_FUSED_MLP_SHAPES,
)
GRANITE = replace(LLAMA, class_name="GraniteForCausalLM", model_type="granite", add_fields=families.granite)
OLMO2 = Architecture(
    class_name="Olmo2ForCausalLM",
    model_type="olmo2",
    add_fields=families.olmo2,
    layer={
        **_ATTENTION,
        **_QK_NORMS,
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        **_MLP,
    },
    shapes={"attn_q_norm": ("query",), "attn_k_norm": ("key",)},
)
# Of StableLM 2 12B and Command R+, whose heads have norms of their own.
_HEAD_NORM_SHAPES = {"attn_q_norm": ("heads", "head_dim"), "attn_k_norm": ("kv_heads", "head_dim")}
_STABLELM_HEAD_NORMS = {
    "attn_q_norm": "self_attn.q_layernorm.norms.{head}",
    "attn_k_norm": "self_attn.k_layernorm.norms.{head}",
}
STABLELM = Architecture(
    class_name="StableLmForCausalLM",
    model_type="stablelm",
    add_fields=families.stablelm,
    layer={**_NORMS, **_ATTENTION, **_MLP},
    biases={
        ALWAYS: ("output_norm", "attn_norm", "ffn_norm"),
        "use_qkv_bias": ("attn_q", "attn_k", "attn_v"),
    },
    partial_rotary=True,
    shapes=_HEAD_NORM_SHAPES,
)
# The parts of a layer read the same input, so it has one norm.
STABLELM_PARALLEL = replace(
    STABLELM,
    layer={"attn_norm": "input_layernorm", **_ATTENTION, **_MLP},
    biases={**STABLELM.biases, ALWAYS: ("output_norm", "attn_norm")},
)
COHERE = Architecture(
    class_name="CohereForCausalLM",
    model_type="cohere",
    add_fields=families.cohere,
    layer={"attn_norm": "input_layernorm", **_ATTENTION, **_MLP},
)
COHERE_PLUS = replace(COHERE, layer={**COHERE.layer, **_QK_NORMS}, shapes=_HEAD_NORM_SHAPES)
COHERE2 = replace(COHERE, class_name="Cohere2ForCausalLM", model_type="cohere2", add_fields=families.cohere2)
CHATGLM = Architecture(
    class_name="ChatGLMModel",
    model_type="chatglm",
    add_fields=families.chatglm,
    outer={
        "token_embd": "transformer.embedding.word_embeddings",  # nosec B105 # no password
        "output_norm": "transformer.encoder.final_layernorm",
        "output": "transformer.output_layer",
    },
    layers="transformer.encoder.layers",
    layer={
        **_NORMS,
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    biases={"add_qkv_bias": ("attn_qkv",)},
    partial_rotary=True,
    shapes=_FUSED_MLP_SHAPES,
)
# The same models in transformers' own form.
GLM = Architecture(
    class_name="GlmForCausalLM",
    model_type="glm",
    add_fields=families.glm,
    layer={**_NORMS, **_ATTENTION, **_FUSED_MLP},
    biases={"attention_bias": ("attn_q", "attn_k", "attn_v")},
    partial_rotary=True,
    shapes=_FUSED_MLP_SHAPES,
)
GLM4 = replace(
    GLM,
    class_name="Glm4ForCausalLM",
    model_type="glm4",
    layer={
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        **_ATTENTION,
        **_FUSED_MLP,
    },
)
BAICHUAN = Architecture(
    class_name="BaichuanForCausalLM",
    model_type="baichuan",
    add_fields=families.baichuan,
    layer={**_NORMS, "attn_output": "self_attn.o_proj", **_MLP},
    fused={"self_attn.W_pack": ("attn_q", "attn_k", "attn_v")},
    permuted=_ROTATED,
)
GPT_OSS = Architecture(
    class_name="GptOssForCausalLM",
    model_type="gpt_oss",
    add_fields=families.gpt_oss,
    layer={
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        **_ATTENTION,
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
    packed={
        "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "mlp.experts.down_proj": ("ffn_down_exps",),
    },
    biases={ALWAYS: (*_ATTENTION_BIASES, "ffn_gate_inp")},
)
# By `general.architecture`.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "qwen": QWEN1,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2moe": QWEN2MOE,
    "qwen3moe": QWEN3MOE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "stablelm": STABLELM,
    "command-r": COHERE,
    "cohere2": COHERE2,
    "chatglm": CHATGLM,
    "glm4": GLM4,
    "baichuan": BAICHUAN,
    "gpt-oss": GPT_OSS,
}


def architecture_name(gguf: GgufFile) -> str:
    """The file's `general.architecture`, one of ARCHITECTURES.

    Raises:
        ConfigError: it is missing or not among them.
    """
    name: str = gguf.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{gguf.path}: GGUF files of the architecture {name[:40]!r} cannot be converted, only those of "
            f"{', '.join(ARCHITECTURES)}; use the model's Hugging Face directory instead"
        )
    return name


def find_architecture(gguf: GgufFile) -> Architecture:
    """The row that a file's tensors are described by: some names stand for several layouts.

    Raises:
        ConfigError: as `architecture_name`.
    """
    name, tensors = architecture_name(gguf), gguf.tensors
    architecture = ARCHITECTURES[name]
    if name == "llama" and gguf.optional("llama.expert_count", int, 0) != 0:
        architecture = MIXTRAL
    elif name == "chatglm" and "blk.0.attn_qkv.weight" not in tensors:
        architecture = GLM
    elif name == "stablelm" and "blk.0.ffn_norm.weight" not in tensors:
        architecture = STABLELM_PARALLEL
    if families.HEAD_NORM in tensors:
        if name == "stablelm":
            architecture = replace(architecture, head_norms=_STABLELM_HEAD_NORMS)
        elif name == "command-r":
            architecture = COHERE_PLUS
    if architecture.experts and "blk.0.ffn_gate.0.weight" in tensors:
        architecture = replace(architecture, experts_are_apart=True)
    return architecture
