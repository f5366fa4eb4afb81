"""Which modules a quantized checkpoint's configuration excludes."""

from __future__ import annotations

import pytest

from engine.quant.excluded import ExcludedModules
from pagewire.base.errors import ConfigError

LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("entry", "excluded", "kept"),
    [
        ("lm_head", ["lm_head", "language_model.lm_head"], [f"{LAYER}.mlp.down_proj", "lm_head_2"]),
        (f"{LAYER}.mlp.down_proj", [f"{LAYER}.mlp.down_proj"], ["model.layers.11.mlp.down_proj"]),
        (LAYER, [f"{LAYER}.self_attn.q_proj"], ["model.layers.11.self_attn.q_proj"]),
        ("mlp.gate", [f"{LAYER}.mlp.gate"], [f"{LAYER}.mlp.gate_proj"]),
        ("q_proj", [f"{LAYER}.self_attn.q_proj"], [f"{LAYER}.self_attn.qkv_proj"]),
        ("re:.*self_attn.*", [f"{LAYER}.self_attn.q_proj"], [f"{LAYER}.mlp.up_proj"]),
        ("re:model[.]layers[.]1[.]", [f"{LAYER}.mlp.up_proj"], ["model.layers.12.mlp.up_proj"]),
        ("re:layers", [], [f"{LAYER}.mlp.up_proj"]),
        ("re:.*lm_head", ["lm_head", "language_model.lm_head"], ["lm"]),
    ],
)
def test_an_entry_excludes_whole_parts_or_what_its_expression_begins(
    entry: str, excluded: list[str], kept: list[str]
) -> None:
    modules = ExcludedModules([entry], "config.json")
    assert [name for name in [*excluded, *kept] if name in modules] == excluded


def test_an_entry_of_awq_excludes_whatever_contains_it() -> None:
    modules = ExcludedModules(["gate"], "config.json", substrings=True)
    assert f"{LAYER}.mlp.gate_proj" in modules
    assert f"{LAYER}.mlp.up_proj" not in modules


def test_any_of_several_entries_excludes_and_none_excludes_nothing() -> None:
    assert all(name in ExcludedModules(["lm_head", "re:.*o_proj"], "") for name in ("lm_head", "a.o_proj"))
    assert "lm_head" not in ExcludedModules([], "")


def test_a_malformed_expression_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: the module pattern 're:\(' is not a regular"):
        ExcludedModules(["re:("], "config.json")
