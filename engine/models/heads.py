"""What stands on a decoder instead of an output projection, as config.json says: a classification head, or
nothing."""

from __future__ import annotations

from dataclasses import replace

from engine.models.config import ModelConfig
from engine.models.readers.fields import ConfigFields
from pagewire.base.errors import ConfigError

# Beyond what models have: all names travel in one message of the handshake.
MAX_LABELS = 512
MAX_LABEL_BYTES = 16384

# Architecture -> the one with the same decoder and an output projection. The head is transformers'
# GenericForSequenceClassification: a matrix, "score", on the last token's final hidden state.
_CLASSIFIERS = {
    "LlamaForSequenceClassification": "LlamaForCausalLM",
    "MistralForSequenceClassification": "MistralForCausalLM",
    "Qwen2ForSequenceClassification": "Qwen2ForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3ForCausalLM",
    "GemmaForSequenceClassification": "GemmaForCausalLM",
    "Gemma2ForSequenceClassification": "Gemma2ForCausalLM",
    "Gemma3TextForSequenceClassification": "Gemma3ForCausalLM",
    "Phi3ForSequenceClassification": "Phi3ForCausalLM",
    "GlmForSequenceClassification": "GlmForCausalLM",
    "Glm4ForSequenceClassification": "Glm4ForCausalLM",
    "StableLmForSequenceClassification": "StableLmForCausalLM",
    "Olmo2ForSequenceClassification": "Olmo2ForCausalLM",
}
# The decoder alone, as embedding models are saved.
_BACKBONES = {
    "LlamaModel": "LlamaForCausalLM",
    "MistralModel": "MistralForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
    "Qwen3Model": "Qwen3ForCausalLM",
    "GemmaModel": "GemmaForCausalLM",
    "Gemma2Model": "Gemma2ForCausalLM",
    "Gemma3TextModel": "Gemma3ForCausalLM",
    "Phi3Model": "Phi3ForCausalLM",
}
# How the names of architectures begin whose tokens see those after them.
_BIDIRECTIONAL = (
    "Albert",
    "Bert",
    "Camembert",
    "Deberta",
    "DistilBert",
    "Electra",
    "GteModel",
    "JinaBert",
    "MPNet",
    "ModernBert",
    "NewModel",
    "NewForSequenceClassification",
    "NomicBert",
    "Roberta",
    "XLMRoberta",
)


def decoder_of(architecture: str) -> str:
    """The architecture that has the same decoder and generates; the given one if it does so itself."""
    return _CLASSIFIERS.get(architecture) or _BACKBONES.get(architecture) or architecture


def known_heads() -> list[str]:
    """Every architecture with another head than an output projection."""
    return [*_CLASSIFIERS, *_BACKBONES]


def refuse_bidirectional(architecture: str, fields: ConfigFields) -> None:
    """Refuses models whose tokens see those after them: only causal attention is computed.

    Raises:
        ConfigError: the model is such a one.
    """
    if architecture.startswith(_BIDIRECTIONAL):
        raise ConfigError(
            f"{fields.source}: architecture {architecture!r} is a bidirectional encoder, which is not "
            "supported: this engine computes decoders, whose tokens see only those before them. Embeddings "
            "and scores are served from decoders, such as Qwen3-Embedding and Qwen3-Reranker"
        )
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        value = fields.get(name, causal)
        if value != causal:
            raise ConfigError(
                f"{fields.source}: {name} is {value!r}: the model's tokens see those after them, which is "
                "not supported; this engine computes causal attention only"
            )


def with_head(config: ModelConfig, architecture: str, fields: ConfigFields) -> ModelConfig:
    """The configuration of a decoder, with the head of an architecture.

    Raises:
        ConfigError: id2label or num_labels is wrong.
    """
    if architecture in _CLASSIFIERS:
        return replace(config, labels=_read_labels(fields), has_lm_head=False)
    return replace(config, has_lm_head=False) if architecture in _BACKBONES else config


def _read_labels(fields: ConfigFields) -> tuple[str, ...]:
    """The classes' names by their numbers. As in transformers, there are two where the file says nothing."""
    names = fields.get("id2label")
    if names is None:
        count = fields.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_LABELS:
            fields.fail("num_labels", count, f"a number of classes, from 1 to {MAX_LABELS}")
        return tuple(f"LABEL_{number}" for number in range(count))
    allowed = f"an object with the names of the classes 0, 1, ..., {MAX_LABELS} at most"
    if not isinstance(names, dict) or not 1 <= len(names) <= MAX_LABELS:
        fields.fail("id2label", names, allowed)
    if set(names) != set(map(str, range(len(names)))):
        fields.fail("id2label", names, allowed)
    labels = tuple(str(names[str(number)]) for number in range(len(names)))
    size = sum(len(label.encode(errors="replace")) for label in labels)
    if size > MAX_LABEL_BYTES:
        raise ConfigError(
            f"{fields.source}: the names in id2label have {size} bytes; at most {MAX_LABEL_BYTES} are taken"
        )
    return labels
