"""The rotary embedding's part of config.json."""

from __future__ import annotations

from engine.layers.rope_scaling import RopeScaling
from engine.models.config import RotaryConfig
from engine.models.readers.fields import ConfigFields


def read_rotary(fields: ConfigFields, rotary_dim: int) -> RotaryConfig:
    """How all layers of a model rotate, from `rope_parameters` (newer) or `rope_theta` + `rope_scaling`."""
    theta, scaling = _read_rope(fields)
    return RotaryConfig(rotary_dim=rotary_dim, theta=theta, scaling=scaling)


def _read_rope(fields: ConfigFields) -> tuple[float, RopeScaling | None]:
    parameters = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        fields.fail("rope_scaling", parameters, "an object or null")
    rope = ConfigFields(parameters, f"{fields.source}: rope parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        rope.fail("partial_rotary_factor", parameters["partial_rotary_factor"], "1")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=rope.number("factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            kind=kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.positive("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            rope.fail("low_freq_factor", scaling.low_freq_factor, "less than high_freq_factor")
        return theta, scaling
    raise rope.error("rope_type", kind, "'default', 'linear' or 'llama3'; no other scaling is implemented")
