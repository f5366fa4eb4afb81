"""Which layers have a sliding window, as config.json says."""

from __future__ import annotations

from engine.models.readers.fields import ConfigFields

_KINDS = {"full_attention", "sliding_attention"}


def read_sliding_windows(fields: ConfigFields, architecture: str, num_layers: int) -> list[int]:
    """Each layer's window in tokens, 0 for none.

    Mistral's window is for all layers, and 4096 where the file does not mention it. Qwen's is switched on by
    `use_sliding_window`, for the layers that `layer_types` (newer) names or for those from number
    `max_window_layers` on. Llama has none.
    """
    if architecture == "Qwen3ForCausalLM":
        return _read_qwen(fields, num_layers)
    is_mistral = architecture == "MistralForCausalLM"
    window = fields.values.get("sliding_window", 4096 if is_mistral else None)
    # Some checkpoints carry a window that use_sliding_window switches off.
    if window is None or not fields.values.get("use_sliding_window", True):
        return [0] * num_layers
    if not is_mistral:
        fields.fail("sliding_window", window, f"null: a {architecture} has none")
    return [fields.positive("sliding_window", 4096)] * num_layers


def _read_qwen(fields: ConfigFields, num_layers: int) -> list[int]:
    given = fields.values.get("sliding_window", 4096)
    if given is None or not fields.flag("use_sliding_window"):
        return [0] * num_layers
    window = fields.positive("sliding_window", 4096)
    types = fields.values.get("layer_types")
    if types is None:
        num_full = fields.values.get("max_window_layers", 28)
        if not isinstance(num_full, int) or isinstance(num_full, bool) or num_full < 0:
            fields.fail("max_window_layers", num_full, "a number of layers")
        return [window if layer >= num_full else 0 for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= _KINDS:
        allowed = " or ".join(sorted(_KINDS))
        fields.fail("layer_types", types, f"a list of {num_layers} entries, each {allowed}")
    return [window if kind == "sliding_attention" else 0 for kind in types]
