"""The rotary embedding's part of config.json."""

from __future__ import annotations

import math

from engine.layers.rope_scaling import RopeScaling
from engine.models.config import RotaryConfig
from engine.models.readers.fields import ConfigFields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rotary(
    fields: ConfigFields, head_dim: int, *, part: float = 1.0, interleaved: bool = False
) -> RotaryConfig:
    """How all layers of a model rotate, from `rope_parameters` (newer) or `rope_theta` + `rope_scaling`.

    Args:
        part: the share of a head's channels that are rotated, where the file does not say.
    """
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling")
    return read_rope(fields, parameters, head_dim, default_theta=1e4, part=part, interleaved=interleaved)


def read_rope(
    fields: ConfigFields,
    parameters: object,
    head_dim: int,
    *,
    default_theta: float,
    part: float = 1.0,
    interleaved: bool = False,
) -> RotaryConfig:
    """One way of rotating.

    Args:
        parameters: an object as `rope_parameters` is, or None.
        default_theta: what counts where neither it nor `rope_theta` of the whole file gives a base.
    """
    values = parameters or {}
    if not isinstance(values, dict):
        fields.fail("rope_scaling", values, "an object or null")
    rope = ConfigFields(values, f"{fields.source}: rope parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta", default_theta))
    part = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", part))
    rotary_dim = int(head_dim * part)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        rope.fail("partial_rotary_factor", part, f"a share of {head_dim} that is even")
    scaling = _read_scaling(fields, rope, rotary_dim)
    return RotaryConfig(rotary_dim=rotary_dim, theta=theta, scaling=scaling, interleaved=interleaved)


def _read_scaling(fields: ConfigFields, rope: ConfigFields, rotary_dim: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su":  # what Phi-3's first files call it
        kind = "longrope"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=rope.number("factor"))
    if kind == "dynamic":
        return RopeScaling(
            kind=kind, factor=rope.number("factor"), original_max_position=_original(fields, rope)
        )
    if kind == "llama3":
        return _read_llama3(rope)
    if kind == "yarn":
        return _read_yarn(fields, rope)
    if kind == "longrope":
        return _read_longrope(fields, rope, rotary_dim)
    allowed = ", ".join(map(repr, KINDS))
    raise rope.error("rope_type", kind, f"one of {allowed}; no other scaling is implemented")


def _original(fields: ConfigFields, rope: ConfigFields) -> int:
    """The context that the model was first trained on."""
    name = "original_max_position_embeddings"
    return rope.positive(name, fields.positive(name, fields.positive("max_position_embeddings", 2048)))


def _read_llama3(rope: ConfigFields) -> RopeScaling:
    scaling = RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.positive("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        rope.fail("low_freq_factor", scaling.low_freq_factor, "less than high_freq_factor")
    return scaling


def _read_yarn(fields: ConfigFields, rope: ConfigFields) -> RopeScaling:
    original = _original(fields, rope)
    factor = rope.number("factor", fields.positive("max_position_embeddings", original) / original)
    attention_factor = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        grown, divisor = (
            1.0 if factor <= 1 else 0.1 * rope.number(name) * math.log(factor) + 1
            for name in ("mscale", "mscale_all_dim")
        )
        attention_factor = grown / divisor
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow > fast:
        rope.fail("beta_slow", slow, f"at most beta_fast ({fast})")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
    )


def _read_longrope(fields: ConfigFields, rope: ConfigFields, rotary_dim: int) -> RopeScaling:
    original = _original(fields, rope)
    factor = rope.number("factor", fields.positive("max_position_embeddings", original) / original)
    attention_factor = 1.0
    if factor > 1 and original > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        short_factors=_divisors(rope, "short_factor", rotary_dim // 2),
        long_factors=_divisors(rope, "long_factor", rotary_dim // 2),
    )


def _divisors(rope: ConfigFields, name: str, count: int) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != count:
        rope.fail(name, values, f"a list of {count} numbers")
    divisors = [ConfigFields({name: value}, rope.source).number(name) for value in values]
    return tuple(divisors)
