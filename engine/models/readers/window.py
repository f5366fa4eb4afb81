"""Which layers have a sliding window, as config.json says."""

from __future__ import annotations

from engine.models.readers.fields import ConfigFields

_SLIDING = "sliding_attention"
_KINDS = {"full_attention", _SLIDING}
_QWEN = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"}
_MISTRAL = {"MistralForCausalLM": 4096, "MixtralForCausalLM": None}


def read_sliding_windows(fields: ConfigFields, architecture: str, num_layers: int) -> list[int]:
    """Each layer's window in tokens, 0 for none.

    Mistral's window is for all layers, and 4096 where the file does not mention it. Qwen's is switched on by
    `use_sliding_window`, for the layers that `layer_types` (newer) names or for those from number
    `max_window_layers` on. Llama has none.
    """
    if architecture in _QWEN:
        return _read_qwen(fields, num_layers)
    window = fields.values.get("sliding_window", _MISTRAL.get(architecture))
    # Some checkpoints carry a window that use_sliding_window switches off.
    if window is None or not fields.values.get("use_sliding_window", True):
        return [0] * num_layers
    if architecture not in _MISTRAL:
        fields.fail("sliding_window", window, f"null: a {architecture} has none")
    return [fields.positive("sliding_window", 4096)] * num_layers


def _read_qwen(fields: ConfigFields, num_layers: int) -> list[int]:
    given = fields.values.get("sliding_window", 4096)
    if given is None or not fields.flag("use_sliding_window"):
        return [0] * num_layers
    window = fields.positive("sliding_window", 4096)
    if fields.get("layer_types") is None:
        num_full = fields.get("max_window_layers", 28)
        if not isinstance(num_full, int) or isinstance(num_full, bool) or num_full < 0:
            fields.fail("max_window_layers", num_full, "a number of layers")
        return [window if layer >= num_full else 0 for layer in range(num_layers)]
    return [window if is_windowed else 0 for is_windowed in read_layer_types(fields, num_layers, every=1)]


def read_layer_types(fields: ConfigFields, num_layers: int, *, every: int) -> list[bool]:
    """Whether each layer has a window: as `layer_types` says, or all but each `every`th."""
    types = fields.get("layer_types")
    if types is None:
        return [(layer + 1) % every != 0 for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not set(map(str, types)) <= _KINDS:
        allowed = " or ".join(sorted(_KINDS))
        fields.fail("layer_types", types, f"a list of {num_layers} entries, each {allowed}")
    return [kind == _SLIDING for kind in types]
