"""What config.json gets from the keys of a GGUF file, and which keys are refused."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.architectures import ARCHITECTURES, architecture_name, find_architecture
from pagewire.hub.gguf.config import model_config
from pagewire.hub.gguf.keys import ModelKeys, model_sizes
from pagewire.hub.gguf.layout import place_tensors
from pagewire.hub.gguf.reader import GgufFile, GgufTensor
from tests.unit.corrupt.mutations import hostile_value

PATH = Path("/models/tiny.gguf")
KEYS: dict[str, Any] = {
    "block_count": 4,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
# What some architectures need besides, or may have.
OWN_KEYS: dict[str, dict[str, Any]] = {
    "qwen2moe": {"expert_count": 8, "expert_used_count": 2, "expert_weights_norm": True},
    "qwen3moe": {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32},
    "gemma2": {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0},
    "gemma3": {"attention.sliding_window": 16, "attention.sliding_window_pattern": [1, 0, 1, 1]},
    "phi3": {"attention.sliding_window": 16, "rope.scaling.original_context_length": 32},
    "granite": {"embedding_scale": 12.0, "rope.scaling.finetuned": True},
    "olmo2": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 8.0},
    "command-r": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, "attention.sliding_window": 16},
    "chatglm": {"rope.dimension_count": 8},
    "glm4": {"rope.dimension_count": 8},
    "gpt-oss": {"expert_count": 8, "expert_used_count": 2, "attention.sliding_window": 16},
}


def gguf_file(architecture: str, *tensors: str, **changes: Any) -> GgufFile:
    """A file of these keys, "__" standing for "."; a change to None leaves one out."""
    keys = {**KEYS, **OWN_KEYS.get(architecture, {})}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    metadata = {f"{architecture}.{name}": value for name, value in keys.items() if value is not None}
    data = np.ones(8, np.float32).view(np.uint8).reshape(1, -1)
    made = {name: GgufTensor(name, GGMLQuantizationType.F32, (8,), data) for name in tensors}
    return GgufFile(PATH, {"general.architecture": architecture, **metadata}, made)


def config_of(gguf: GgufFile) -> dict[str, Any]:
    keys = ModelKeys(gguf, architecture_name(gguf))
    return model_config(keys, find_architecture(gguf), model_sizes(keys, 300))


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma2", 42, 32), ("gemma2", 46, 16), ("gemma3", 62, 16)]
)
def test_the_largest_gemmas_scale_scores_by_their_width(architecture: str, layers: int, scalar: int) -> None:
    """No key says so. 27B has 46 layers in Gemma 2, 62 in Gemma 3."""
    gguf = gguf_file(architecture, block_count=layers, attention__key_length=32)
    gguf.metadata.pop(f"{architecture}.attention.sliding_window_pattern", None)
    assert config_of(gguf)["query_pre_attn_scalar"] == scalar


def test_gemma_3_has_windows_where_its_file_names_one() -> None:
    windowed = config_of(gguf_file("gemma3", attention__sliding_window_pattern=None))
    whole = config_of(
        gguf_file("gemma3", attention__sliding_window_pattern=None, attention__sliding_window=None)
    )
    assert set(windowed["layer_types"]) == {"sliding_attention"}  # the sixth would be the first without
    assert set(whole["layer_types"]) == {"full_attention"}


@pytest.mark.parametrize("pattern", [2, [True, False, True, False], [1, 0, 1, 0]])
def test_a_pattern_of_windows_is_a_period_or_a_list(pattern: Any) -> None:
    types = config_of(gguf_file("gemma3", attention__sliding_window_pattern=pattern))["layer_types"]
    assert types == ["sliding_attention", "full_attention"] * 2


def test_baichuan_of_40_layers_does_not_rotate() -> None:
    small, large = (config_of(gguf_file("baichuan", block_count=layers)) for layers in (32, 40))
    assert small["max_position_embeddings"] == large["model_max_length"] == 128
    assert "max_position_embeddings" not in large


def test_phi_without_a_window_has_a_window_of_zero_in_its_file() -> None:
    assert config_of(gguf_file("phi3", attention__sliding_window=0))["sliding_window"] is None


def test_a_share_of_a_head_is_rotated_exactly() -> None:
    """0.58 * 100 is a little less than 58."""
    sizes = {"attention__key_length": 100, "rope__dimension_count": 58}
    assert int(100 * config_of(gguf_file("phi3", **sizes))["partial_rotary_factor"]) == 58


def test_qwens_experts_say_whether_their_weights_add_up_to_one() -> None:
    assert config_of(gguf_file("qwen2moe"))["norm_topk_prob"] is True
    assert config_of(gguf_file("qwen2moe", expert_weights_norm=None))["norm_topk_prob"] is False
    assert config_of(gguf_file("qwen3moe"))["norm_topk_prob"] is True


@pytest.mark.parametrize(
    ("gguf", "said"),
    [
        (gguf_file("olmo2", attention__sliding_window=16), "OLMo 3"),
        (gguf_file("granite", rope__scaling__finetuned=False), "without rotation"),
        (gguf_file("glm4", rope__dimension_sections=[2, 3, 3, 0]), "GLM-4V"),
        (gguf_file("chatglm", "blk.0.attn_qkv.weight", rope__dimension_count=16), "ChatGLM rotates half"),
        (gguf_file("qwen", feed_forward_length=97), "must be even"),
        (gguf_file("qwen", "rope_freqs.weight"), "qwen does not have"),
        (gguf_file("qwen", rope__scaling__type="linear", rope__scaling__factor=2.0), "qwen does not have"),
        (gguf_file("phi3", attention__sliding_window=-1), "a number of tokens"),
        (gguf_file("phi3", rope__dimension_count=7), "an even number"),
        (gguf_file("qwen2", rope__dimension_count=8), "Qwen2ForCausalLM rotates all"),
        (gguf_file("qwen3moe", expert_used_count=9), "9 of 8 experts"),
        (gguf_file("qwen3moe", expert_count=None), "2 of 0 experts"),
        (gguf_file("gemma3", attention__sliding_window_pattern=[1, 0]), "each of the 4 layers"),
        (gguf_file("gemma3", attention__sliding_window_pattern=0), "a number of layers"),
        (gguf_file("gemma2", attention__head_count_kv=[4, 4]), "is a list; it must be a int"),
        (gguf_file("llama", expert_count=4096, block_count=1024, expert_used_count=1), "matrices of experts"),
    ],
    ids=lambda value: None if isinstance(value, GgufFile) else str(value),
)
def test_what_the_family_does_not_have_is_refused_by_name(gguf: GgufFile, said: str) -> None:
    # Enough tensors for the layers that some of these ask for.
    gguf.tensors.update({f"t{index}": next(iter(gguf.tensors.values()), None) for index in range(1024)})
    with pytest.raises(ConfigError, match=rf"^{PATH}: .*{said}"):
        read_all(gguf)


def read_all(gguf: GgufFile) -> None:
    keys = ModelKeys(gguf, architecture_name(gguf))
    architecture, sizes = find_architecture(gguf), model_sizes(keys, 300)
    place_tensors(gguf, architecture, sizes, model_config(keys, architecture, sizes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(random=st.integers(0, 2**64).map(Random))
def test_damaged_keys_of_any_architecture_are_refused_by_name(architecture: str, random: Random) -> None:
    """The tensors are missing, so every file is refused."""
    divisors = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    gguf = gguf_file(architecture, *random.sample(divisors, random.choice((0, 0, 1, 2))))
    for _ in range(random.choice((0, 1, 1, 2))):
        gguf.metadata[random.choice(list(gguf.metadata))] = hostile_value(random)
    with pytest.raises(ConfigError) as raised:
        read_all(gguf)
    assert raised.value.message.startswith(f"{PATH}: ")
    assert raised.value.message.isprintable()
    assert len(raised.value.message) <= 1000
