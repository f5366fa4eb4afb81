"""Why a model is not served, as well as can be told from its architecture's name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

# (reason, architectures). docs/models.md has the same rows.
_NOT_SUPPORTED: Sequence[tuple[str, Sequence[str]]] = (
    (
        "an encoder and a decoder; only decoders are served",
        (
            "T5ForConditionalGeneration",
            "BartForConditionalGeneration",
            "WhisperForConditionalGeneration",
        ),
    ),
    (
        "layers with a state instead of keys and values",
        (
            "MambaForCausalLM",
            "Mamba2ForCausalLM",
            "JambaForCausalLM",
            "Qwen3NextForCausalLM",
        ),
    ),
    (
        "latent attention (MLA)",
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "KimiK2ForCausalLM",
        ),
    ),
    (
        "chunked attention",
        (
            "Llama4ForConditionalGeneration",
            "Llama4ForCausalLM",
        ),
    ),
    (
        "per-layer embeddings",
        ("Gemma3nForConditionalGeneration",),
    ),
    (
        "feed-forward parts without a gate, learned positions",
        (
            "GPT2LMHeadModel",
            "OPTForCausalLM",
            "GPTNeoXForCausalLM",
            "FalconForCausalLM",
            "BloomForCausalLM",
            "MptForCausalLM",
            "Starcoder2ForCausalLM",
        ),
    ),
    (
        "another block than Phi-3's",
        (
            "PhiForCausalLM",
            "PhiMoEForCausalLM",
            "PhimoeForCausalLM",
        ),
    ),
    (
        "models of pictures; only text is served",
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "LlavaForConditionalGeneration",
            "MllamaForConditionalGeneration",
        ),
    ),
)
NOT_SUPPORTED = {name: reason for reason, names in _NOT_SUPPORTED for name in names}


def why_not(architecture: str, supported: Collection[str]) -> str:
    """The end of the sentence "... is not supported"."""
    if architecture in NOT_SUPPORTED:
        return f": {NOT_SUPPORTED[architecture]}; see docs/models.md#not-supported"
    near = get_close_matches(architecture, supported, n=1, cutoff=0.8)
    hint = f"; the nearest name is {near[0]!r}" if near else ""
    return f"; docs/models.md lists what is{hint}"
