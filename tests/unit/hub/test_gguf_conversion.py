"""A converted GGUF file is the model that transformers loads from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import load_file

from engine.layers.rope_scaling import RopeScaling
from engine.loader.blocks import dequantize
from engine.loader.stream import stored_tensors
from engine.models.families import load_model_config
from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.convert import convert_gguf
from tests.unit.hub.conftest import HEAD_DIM, HEADS, BuildGguf

CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
)


def convert(path: Path, directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    directory.mkdir()
    convert_gguf(path, directory, progress=False, dequantized=True)
    config = json.loads((directory / "config.json").read_text())
    return config, load_file(directory / "model.safetensors")


@pytest.mark.usefixtures("reading_once")
def test_weights_and_configuration_equal_those_of_transformers(
    smollm2_float32_dir: Path, smollm2_gguf: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    ours = load_file(smollm2_float32_dir / "model.safetensors")
    expected = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(ours[name], tensor.numpy()), name
    config = transformers.AutoConfig.from_pretrained(smollm2_float32_dir)
    assert config.tie_word_embeddings
    assert config.architectures == ["LlamaForCausalLM"]
    for field in CONFIG_FIELDS:
        assert getattr(config, field) == getattr(reference.config, field), field
    assert config.rms_norm_eps == pytest.approx(reference.config.rms_norm_eps)


def test_transformers_loads_the_directory_without_missing_or_unknown_weights(
    smollm2_float32_dir: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_float32_dir, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == 2


def test_query_rows_are_put_back_in_hugging_face_order(build_gguf: BuildGguf, tmp_path: Path) -> None:
    """Row (head, pair i, member j) of the file is row (head, j * head_dim / 2 + i)."""
    original = {}

    def number_rows(tensors: dict[str, np.ndarray]) -> None:
        tensor = tensors["blk.0.attn_q.weight"]
        tensor[:] = np.arange(tensor.shape[0], dtype=np.float32)[:, None]
        original.update(tensors)

    _, weights = convert(build_gguf(edit=number_rows), tmp_path / "out")
    rows = weights["model.layers.0.self_attn.q_proj.weight"][:, 0].reshape(HEADS, 2, HEAD_DIM // 2)
    for head in range(HEADS):
        for pair in range(HEAD_DIM // 2):
            for member in range(2):
                assert rows[head, member, pair] == head * HEAD_DIM + 2 * pair + member
    assert np.array_equal(weights["model.layers.0.self_attn.v_proj.weight"], original["blk.0.attn_v.weight"])


@pytest.mark.parametrize(
    "kind",
    [
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_0,
    ],
)
def test_every_type_is_dequantized_as_gguf_does(
    build_gguf: BuildGguf, tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    original = {}
    path = build_gguf(quantize=kind, edit=original.update)
    _, weights = convert(path, tmp_path / "out")
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        quantized = gguf.quants.quantize(original[f"{theirs}.weight"], kind)
        assert np.array_equal(weights[f"model.{ours}.weight"], gguf.quants.dequantize(quantized, kind))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_that_are_computed_on_stay_as_the_file_has_them(
    build_gguf: BuildGguf, tmp_path: Path, kind: str
) -> None:
    path = build_gguf(quantize=GGMLQuantizationType[kind])
    dequantized = convert(path, tmp_path / "out")[1]
    kept = tmp_path / "kept"
    kept.mkdir()
    convert_gguf(path, kept, progress=False)
    in_blocks = 0
    for stored in stored_tensors(kept / "model.safetensors"):
        tensor = torch.from_numpy(load_file(kept / "model.safetensors")[stored.name])
        if stored.blocks:
            assert stored.blocks == kind
            in_blocks += 1
            tensor = dequantize(tensor, stored.blocks, torch.float32)
        assert np.array_equal(tensor.numpy(), dequantized[stored.name]), stored.name
    assert in_blocks >= 2


def test_an_output_matrix_of_its_own_is_kept(build_gguf: BuildGguf, tmp_path: Path) -> None:
    def untie(tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"] + 1

    config, weights = convert(build_gguf(edit=untie), tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"] + 1)


def test_llama_3_rope_scaling_is_recovered_from_its_divisors(build_gguf: BuildGguf, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    reference = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / scaled.numpy()).astype(np.float32)

    def add_divisors(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = divisors

    def set_theta(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.rope.freq_base")
        writer.add_rope_freq_base(500000.0)

    config, weights = convert(build_gguf(edit=add_divisors, metadata=set_theta), tmp_path / "out")
    assert config["rope_scaling"] == scaling
    assert not any("rope" in name for name in weights)


def test_unknown_rope_divisors_are_refused(build_gguf: BuildGguf, tmp_path: Path) -> None:
    def add_divisors(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)

    with pytest.raises(ConfigError, match="rope_freqs"):
        convert(build_gguf(edit=add_divisors), tmp_path / "out")


def test_all_ends_of_turn_stop_generation(build_gguf: BuildGguf, tmp_path: Path) -> None:
    convert(build_gguf(metadata=lambda writer: writer.add_eot_token_id(5)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 5]


def test_the_engine_ends_a_completion_where_the_file_says(build_gguf: BuildGguf, tmp_path: Path) -> None:
    convert(build_gguf(metadata=lambda writer: writer.add_eot_token_id(5)), tmp_path / "out")
    assert load_model_config(tmp_path / "out").eos_token_ids == (1, 5)


@pytest.mark.parametrize(
    ("kind", "divisors", "said"),
    [
        (gguf.RopeScalingType.YARN, "rope_freqs.weight", "'yarn' and rope_freqs.weight as well"),
        (gguf.RopeScalingType.LINEAR, "rope_freqs.weight", "'linear' and rope_freqs.weight as well"),
        (gguf.RopeScalingType.LONGROPE, None, "'longrope' needs rope_factors_long.weight"),
        (gguf.RopeScalingType.LONGROPE, "rope_factors_long.weight", "lacks the tensor rope_factors_short"),
        (gguf.RopeScalingType.YARN, "rope_factors_long.weight", "rope_factors_long.weight as well"),
    ],
)
def test_rope_scalings_that_contradict_each_other_are_refused_before_anything_is_written(
    build_gguf: BuildGguf, tmp_path: Path, kind: gguf.RopeScalingType, divisors: str | None, said: str
) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    def add_divisors(tensors: dict[str, np.ndarray]) -> None:
        if divisors is not None:
            tensors[divisors] = np.ones(HEAD_DIM // 2, dtype=np.float32)

    with pytest.raises(ConfigError, match=rf"tiny\.gguf: .*{said}"):
        convert(build_gguf(metadata=scale, edit=add_divisors), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_key_of_the_first_converters_for_linear_scaling_is_read(
    build_gguf: BuildGguf, tmp_path: Path
) -> None:
    path = build_gguf(metadata=lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0))
    config, _ = convert(path, tmp_path / "out")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_linear_rope_scaling_is_one_that_the_engine_reads(build_gguf: BuildGguf, tmp_path: Path) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    convert(build_gguf(metadata=scale), tmp_path / "out")
    [rotary] = load_model_config(tmp_path / "out").rotaries
    assert rotary.scaling == RopeScaling(kind="linear", factor=4.0)


def _yarn_of_deepseek(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_yarn_log_mul(0.1)


def _rename(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.mystery.weight"] = tensors["output_norm.weight"]


def _remove(tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def _reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"architecture": "mamba"}, "only those of llama, qwen, .*baichuan"),
        ({"metadata": lambda writer: writer.add_expert_count(8)}, "llama.expert_used_count is missing"),
        ({"metadata": lambda writer: writer.add_expert_count(2**31)}, "llama.expert_count is 2147483648"),
        ({"metadata": lambda writer: writer.add_value_length(8)}, "values 8; they must have the same size"),
        ({"metadata": lambda writer: writer.add_causal_attention(False)}, "only causal models"),
        ({"metadata": _yarn_of_deepseek}, "yarn_log_multiplier is set"),
        ({"metadata": lambda writer: writer.add_rope_dimension_count(8)}, "rotates 8"),
        (
            {"metadata": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)},
            "RoPE scaling 'longrope'",
        ),
        (
            {"metadata": lambda writer: writer.add_string("llama.rope.scaling.type", "spiral")},
            "RoPE scaling 'spiral' is not implemented",
        ),
        ({"metadata": lambda writer: writer.add_pad_token_id(10**6)}, "padding_token_id"),
        ({"edit": _rename}, "blk.0.mystery.weight"),
        ({"edit": _remove}, r"1 missing \(blk\.1\.ffn_up\.weight\)"),
        ({"edit": _reshape}, r"of the wrong shape \(blk\.1\.ffn_up\.weight of \(95, 64\), not \(96, 64\)"),
        ({"pre": "some-new-one"}, "pre-tokenizer 'some-new-one'.*smollm"),
        ({"tokenizer_model": "bert"}, "tokenizer model 'bert'"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    build_gguf: BuildGguf, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        convert(build_gguf(**change), tmp_path / "out")
    assert "tiny.gguf" in raised.value.message


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(build_gguf: BuildGguf, tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        _rename(tensors)
        _reshape(tensors)
        for name in [name for name in tensors if name.startswith("blk.0.attn")]:
            del tensors[name]

    with pytest.raises(ConfigError) as raised:
        convert(build_gguf(edit=damage), tmp_path / "out")
    assert "5 missing (blk.0.attn_k.weight, blk.0.attn_norm.weight, blk.0.attn_output.weight, ...)" in str(
        raised.value
    )
    assert "1 of the wrong shape (blk.1.ffn_up.weight" in raised.value.message
    assert "1 without a place in it (blk.0.mystery.weight)" in raised.value.message


def test_the_default_model_recommends_sampling_that_suits_its_size(smollm2_dir: Path) -> None:
    recommended = json.loads((smollm2_dir / "generation_config.json").read_text())
    assert (recommended["temperature"], recommended["top_p"]) == (0.2, 0.9)
