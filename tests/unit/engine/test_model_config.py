"""Reading config.json: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.layers.rope_scaling import RopeScaling
from engine.models.config import LayerConfig, ModelConfig, RotaryConfig
from engine.models.families import FAMILIES, load_model_config, parse_model_config
from engine.models.not_supported import NOT_SUPPORTED
from pagewire.base.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return parse_model_config({**LLAMA, **changes}, generation or {}, source="config.json")


def test_defaults_are_those_of_the_family() -> None:
    config = parse(num_key_value_heads=None)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.layers == (LayerConfig(rotary=RotaryConfig(rotary_dim=16, theta=10000.0)),) * 2
    assert config.attention_scale == 16**-0.5
    assert not any((config.qkv_bias, config.o_bias, config.mlp_bias, config.tie_word_embeddings))


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    assert parse(head_dim=32).head_dim == 32


def test_attention_bias_is_on_all_four_projections() -> None:
    config = parse(attention_bias=True)
    assert config.qkv_bias
    assert config.o_bias


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5, None),
        ({"rope_theta": 1e4, "rope_scaling": None}, 1e4, None),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            1e4,
            RopeScaling(kind="linear", factor=4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            5e5,
            RopeScaling(kind="llama3", factor=8.0),
        ),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
            5e5,
            RopeScaling(kind="llama3", factor=8.0),
        ),
    ],
    ids=["theta", "new default", "null scaling", "linear", "llama3", "new llama3"],
)
def test_both_generations_of_rope_fields(fields: dict, theta: float, scaling: RopeScaling | None) -> None:
    assert parse(**fields).rotaries == (RotaryConfig(rotary_dim=16, theta=theta, scaling=scaling),)


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, {}, (2,)),
        (2, {"eos_token_id": [7, 2]}, (7, 2)),
        ([2, 3], {"eos_token_id": 9}, (9, 2, 3)),
        (None, {}, ()),
    ],
)
def test_eos_ids_of_both_files_all_count(config_eos: Any, generation: dict, expected: tuple) -> None:
    assert parse(generation, eos_token_id=config_eos).eos_token_ids == expected


TURN_END = {"id": 7, "content": "<|im_end|>", "special": True}
BPE = {"type": "BPE", "vocab": {"a": 0, "</s>": 5}, "merges": []}
UNIGRAM = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]}


def write_tokenizer(directory: Path, tokenizer: Any, **settings: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("eos_token", "tokenizer", "expected"),
    [
        ("<|im_end|>", {"added_tokens": [TURN_END], "model": BPE}, (2, 7)),
        ({"content": "<|im_end|>"}, {"added_tokens": [TURN_END], "model": BPE}, (2, 7)),
        ("<|im_end|>", {"added_tokens": [{**TURN_END, "id": 2}], "model": BPE}, (2,)),
        ("<|im_end|>", {"model": {"added_tokens": []}, "added_tokens": [TURN_END]}, (2, 7)),
        ("</s>", {"added_tokens": [], "model": BPE}, (2, 5)),
        ("</s>", {"added_tokens": [TURN_END], "model": UNIGRAM}, (2, 1)),
        ("<|im_end|>", {"added_tokens": [{**TURN_END, "id": 100}], "model": BPE}, (2,)),
        ("<|elsewhere|>", {"added_tokens": [TURN_END], "model": BPE}, (2,)),
        (None, {"added_tokens": [TURN_END], "model": BPE}, (2,)),
    ],
    ids=[
        "added",
        "as an object",
        "the model's own",
        "behind the vocabulary",
        "in a vocabulary",
        "in a Unigram's list",
        "beyond the model's vocabulary",
        "unknown",
        "null",
    ],
)
def test_the_tokenizers_end_of_text_ends_a_completion_too(
    tmp_path: Path, eos_token: Any, tokenizer: dict, expected: tuple
) -> None:
    directory = write_tokenizer(tmp_path, tokenizer, eos_token=eos_token)
    assert load_model_config(directory).eos_token_ids == expected


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_a_model_may_lack_the_tokenizers_files(tmp_path: Path, missing: str) -> None:
    write_tokenizer(tmp_path, {"added_tokens": [TURN_END]}, eos_token="<|im_end|>")
    (tmp_path / missing).unlink()
    assert load_model_config(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize("content", ["[" * 10**6, '{"added_tokens": [' + "[" * 10**6, "[1]", "{"])
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path, {}, eos_token="<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_model_config(tmp_path)


def test_qwen3_normalises_its_heads() -> None:
    assert parse(architectures=["Qwen3ForCausalLM"]).qk_norm
    assert not parse().qk_norm


MISTRAL, QWEN3 = ["MistralForCausalLM"], ["Qwen3ForCausalLM"]
SWITCHED_ON = {"architectures": QWEN3, "use_sliding_window": True, "sliding_window": 32}


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"architectures": MISTRAL, "sliding_window": None}, [0, 0]),
        ({"architectures": MISTRAL, "sliding_window": 32}, [32, 32]),
        ({"architectures": MISTRAL, "sliding_window": 32, "use_sliding_window": False}, [0, 0]),
        ({"architectures": MISTRAL}, [4096, 4096]),
        ({"architectures": QWEN3, "sliding_window": 32}, [0, 0]),
        ({**SWITCHED_ON, "sliding_window": None}, [0, 0]),
        ({**SWITCHED_ON, "max_window_layers": 1}, [0, 32]),
        (SWITCHED_ON, [0, 0]),
        ({**SWITCHED_ON, "layer_types": ["sliding_attention", "full_attention"]}, [32, 0]),
        ({"sliding_window": 32, "use_sliding_window": False}, [0, 0]),
    ],
    ids=str,
)
def test_layers_have_the_windows_that_their_family_gives_them(fields: dict, windows: list[int]) -> None:
    assert [layer.sliding_window for layer in parse(**fields).layers] == windows


def test_ways_to_rotate_are_listed_once_in_the_order_of_the_layers() -> None:
    far, near = (RotaryConfig(rotary_dim=16, theta=theta) for theta in (1e6, 1e4))
    layers = [LayerConfig(rotary=rotary) for rotary in (near, None, near, far)]
    config = replace(parse(), layers=tuple(layers))
    assert config.rotaries == (near, far)
    assert config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("changes", "task", "labels"),
    [
        ({}, "generate", ()),
        ({"architectures": ["LlamaModel"]}, "embed", ()),
        (CLASSIFIER, "classify", ("LABEL_0", "LABEL_1")),
        ({**CLASSIFIER, "num_labels": 1}, "classify", ("LABEL_0",)),
        ({**CLASSIFIER, "id2label": {"1": "good", "0": "bad"}}, "classify", ("bad", "good")),
        ({"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": None}, "embed", ()),
    ],
    ids=str,
)
def test_what_a_model_is_for_follows_from_its_architecture(changes: dict, task: str, labels: tuple) -> None:
    config = parse(**changes)
    assert (config.task, config.labels) == (task, labels)
    assert config.architecture.endswith("ForCausalLM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FooModel"]}, "'FooModel' is not supported; docs/models.md lists what is"),
        ({"architectures": ["BertModel"]}, "'BertModel' is a bidirectional encoder"),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "is a bidirectional encoder"),
        ({"is_causal": False}, "is_causal is False: the model's tokens see those after them"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"architectures": ["LlamaForSequenceClasification"]}, "nearest name is 'LlamaForSequenceClassif"),
        ({**CLASSIFIER, "num_labels": 0}, "num_labels is 0; it must be a number of classes"),
        ({**CLASSIFIER, "id2label": {}}, "id2label is {}; it must be an object"),
        ({**CLASSIFIER, "id2label": {"1": "a"}}, "with the names of the classes 0, 1"),
        ({**CLASSIFIER, "id2label": {"0": "a" * 20000}}, "names in id2label have 20000 bytes"),
        ({"architectures": ["Qwen4ForCausalLM"]}, "the nearest name is 'Qwen3ForCausalLM'"),
        ({"architectures": None}, "architectures is None"),
        ({"sliding_window": 4096}, "sliding_window is 4096; it must be null: a LlamaForCausalLM has none"),
        ({"architectures": MISTRAL, "sliding_window": -1}, "sliding_window is -1; it must be a positive"),
        ({**SWITCHED_ON, "layer_types": ["chunked"]}, "layer_types is ['chunked']; it must be a list of 2"),
        ({**SWITCHED_ON, "max_window_layers": "1"}, "max_window_layers is '1'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of 'silu'"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "rope_type is 'ntk'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is None; it must be a list of 8"),
        ({"rope_scaling": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is None"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantized as 'aqlm', which is not supported"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads (4)"),
        ({"hidden_size": None}, "hidden_size is None; it must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts is None"),
        ({"architectures": ["GptOssForCausalLM"]}, "num_local_experts is None"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts is None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": 100}, "eos_token_id 100 is not a token id below 100"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(**changes)
    assert message in error.value.message


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)


def test_generation_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    assert load_model_config(tmp_path).eos_token_ids == (5, 2)


def test_the_page_about_models_has_a_row_for_every_architecture() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    supported, refused = page.split("## Not supported")
    assert {name for name in FAMILIES if f"`{name}`" not in supported} == set()
    assert set(re.findall(r"`(\w+)`", refused)) - {"architectures"} == set(NOT_SUPPORTED)
    assert not FAMILIES.keys() & NOT_SUPPORTED.keys()
    for line in [
        each for each in refused.splitlines() if each.startswith("| `") and "architectures" not in each
    ]:
        names, reason = line.strip("| ").split(" | ")
        assert {NOT_SUPPORTED[name.strip("`")] for name in names.split(", ")} == {reason}
