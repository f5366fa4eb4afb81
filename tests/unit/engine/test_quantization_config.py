"""What descriptions of quantizations say, and what of it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import WorkerConfig
from engine.quant.config import Quantization
from engine.quant.readers.read import read_quantization
from engine.quant.schemes import Activations, AtLoad, Awq, Fp8, Gptq, Int8, PackedInts, SqueezeLlm
from pagewire.base.errors import ConfigError
from tests.unit.engine.quantized_checkpoints import compressed

LAYER = "model.layers.1"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def read(described: dict[str, Any], wanted: str = "auto") -> Quantization:
    quantization = read_quantization({"quantization_config": described}, "config.json", wanted=wanted)
    assert quantization is not None
    return quantization


def scheme(described: dict[str, Any], module: str = f"{LAYER}.mlp.up_proj") -> Any:
    return read(described).scheme_of([module])


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}, Awq(64)),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": False},
            Awq(0, zero_point=False),
        ),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": False, "desc_act": True},
            Gptq(3, 128, symmetric=False, desc_act=True),
        ),
        (
            {"quant_method": "gptq", "bits": 2, "group_size": -1, "checkpoint_format": "gptq_v2"},
            Gptq(2, 0, stored_less_one=False),
        ),
        ({"quant_method": "gptq", "bits": 4, "format": "gptq"}, Gptq(4, 128)),
        (
            {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 32,
                "packing_format": "auto_round:auto_gptq",
            },
            Gptq(4, 32),
        ),
        (
            {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 32,
                "packing_format": "auto_round:auto_awq",
            },
            Awq(32),
        ),
        ({"quant_method": "fp8"}, Fp8("tensor", Activations.TOKEN)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, Fp8("tensor", Activations.TENSOR)),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            Fp8("block", Activations.GROUP, (128, 128)),
        ),
        ({"quant_method": "squeezellm", "wbits": 3}, SqueezeLlm(3)),
        (compressed("pack-quantized", {**INT4, "actorder": "group"}), PackedInts(4, 128, ordered=True)),
        (compressed("pack-quantized", {**INT4, "actorder": "weight"}), PackedInts(4, 128)),
        (compressed("int-quantized", INT8, {**TOKENS, "type": "int"}), Int8(False, Activations.TOKEN)),
        (compressed("naive-quantized", FP8, {**TOKENS, "type": "float"}), Fp8("channel", Activations.TOKEN)),
    ],
)
def test_descriptions_are_read(described: dict[str, Any], expected: object) -> None:
    assert scheme(described) == expected
    assert read(described).schemes == (expected,)
    assert scheme(described, "lm_head") is None


def test_an_output_projection_is_quantized_where_gptq_says_so() -> None:
    described = {"quant_method": "gptq", "bits": 4, "lm_head": True}
    assert scheme(described, "lm_head") == Gptq(4, 128)


def test_whole_names_come_before_patterns_and_those_before_classes() -> None:
    described = compressed("mixed-precision", INT4)
    described["config_groups"] = {
        "a": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "b": {"targets": ["re:.*down_proj"], "weights": INT8, "format": "pack-quantized"},
        "c": {"targets": [f"{LAYER}.mlp.down_proj"], "weights": FP8, "format": "float-quantized"},
    }
    assert scheme(described) == PackedInts(4, 128)
    assert scheme(described, "model.layers.0.mlp.down_proj") == PackedInts(8, 0)
    assert scheme(described, f"{LAYER}.mlp.down_proj") == Fp8("channel", Activations.NONE)
    assert read(described).summary == (
        "compressed-tensors, 4 bits in groups of 128 and 8 bits in channels and fp8 by channel, inputs as "
        "they are"
    )


def test_targets_without_a_class_leave_the_others_plain() -> None:
    described = compressed("pack-quantized", INT4, targets=["re:.*mlp.*"])
    assert scheme(described) == PackedInts(4, 128)
    assert scheme(described, f"{LAYER}.self_attn.q_proj") is None


def test_modules_are_left_out_by_each_formats_own_list() -> None:
    assert scheme({"quant_method": "awq", "modules_to_not_convert": ["up_"]}) is None
    for name in ("ignored_layers", "modules_to_not_convert"):
        assert scheme({"quant_method": "fp8", name: [f"{LAYER}.mlp"]}) is None
    skipped = {"load_in_8bit": True, "llm_int8_skip_modules": ["up_proj"]}
    assert scheme({"quant_method": "bitsandbytes", **skipped}) is None


def test_auto_round_may_leave_modules_out_or_give_them_other_settings() -> None:
    own = {f"{LAYER}.mlp.up_proj": {"bits": 16}, f"{LAYER}.mlp.down_proj": {"bits": 8}}
    described = {"quant_method": "auto-round", "bits": 4, "extra_config": own}
    assert scheme(described) is None
    assert scheme(described, f"{LAYER}.mlp.down_proj") == Gptq(8, 128)


def test_bitsandbytes_need_not_name_itself() -> None:
    assert read({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).summary == "bitsandbytes, nf4"


GPTQ = {"quant_method": "gptq", "bits": 4}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({**GPTQ, "dynamic": []}, r"dynamic is \[\]; it must be an object or null"),
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": "x"},
            "extra_config is 'x'; it must be an",
        ),
        ({**compressed("int-quantized", INT8), "sparsity_config": 1}, "sparsity_config is 1; it must be an"),
        ({**compressed("int-quantized", INT8), "config_groups": []}, r"config_groups is \[\]; it must be an"),
        (
            {**compressed("int-quantized", INT8), "ignore": "lm_head"},
            "ignore is 'lm_head'; it must be a list",
        ),
        ({"quant_method": "aqlm"}, r"quantized as 'aqlm', which is not supported; supported are awq, gptq, "),
        ({"bits": 4}, "quant_method is None; supported are awq"),
        (
            {"quant_method": "awq", "version": "gemv"},
            r"awq: version 'gemv' is not supported; supported are gemm",
        ),
        ({"quant_method": "awq", "bits": 3}, "awq: bits is 3; supported are 4"),
        (
            {"quant_method": "awq", "group_size": 7},
            "group_size is 7; it must be -1, or a positive multiple of 8",
        ),
        ({**GPTQ, "bits": 5}, "gptq: bits is 5; supported are 2, 3, 4, 8"),
        (
            {**GPTQ, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not supported; supported are gptq",
        ),
        (
            {**GPTQ, "is_marlin_format": True},
            "is_marlin_format is true; supported are the formats gptq and gptq_v2",
        ),
        ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype 'int8' is not supported; supported are int32"),
        ({**GPTQ, "dynamic": {"(": {}}}, r"dynamic has '\('; that is not a regular expression"),
        (
            {**GPTQ, "dynamic": {"a": {"damp_percent": 1}}},
            "dynamic changes damp_percent of 'a'; supported are bits",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4},
            "packing_format 'auto_round' is",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8: fmt 'e5m2' is not supported; supported are e4m3"),
        (
            {"quant_method": "fp8", "scale_fmt": "ue8m0"},
            "scale_fmt 'ue8m0' is not supported; supported are float",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
            "static' with blocks",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size is \[128\]; it must be two",
        ),
        ({**BNB, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16' is not supported"),
        (
            {**BNB, "bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type 'int4' is not supported; supported are nf4, fp4",
        ),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit is true"),
        ({"quant_method": "squeezellm", "wbits": 2}, "squeezellm: wbits is 2; supported are 3, 4"),
        (
            compressed("nvfp4-pack-quantized", INT4),
            "format 'nvfp4-pack-quantized' is not supported; supported are pack",
        ),
        (compressed("pack-quantized", {**INT4, "num_bits": 2}), "num_bits is 2; supported are 4, 8"),
        (
            compressed("pack-quantized", INT4, TOKENS),
            "8-bit inputs with packed 4-bit weights are not supported",
        ),
        (
            compressed("int-quantized", {**INT8, "symmetric": False}),
            "int-quantized weights must be symmetric",
        ),
        (
            compressed("int-quantized", INT8, {**TOKENS, "symmetric": False}),
            "supported where they are static",
        ),
        (compressed("float-quantized", {**FP8, "num_bits": 4}), "num_bits is 4; supported are 8"),
        (compressed("float-quantized", FP8, {**TOKENS, "type": "int"}), "type 'int' is not supported"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "config_groups is missing"),
        (
            {**compressed("int-quantized", INT8), "quantization_status": "frozen"},
            "only compressed checkpoints are",
        ),
        (
            {**compressed("int-quantized", INT8), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(described: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json.*{message}"):
        read(described)


def test_the_user_may_insist_on_a_format_but_not_on_another() -> None:
    assert read(GPTQ, "gptq").method == "gptq"
    with pytest.raises(ConfigError, match=r"quantization is 'awq', but .* says 'gptq'; use auto or gptq"):
        read(GPTQ, "awq")
    with pytest.raises(ConfigError, match=r"quantization is 'int8', but .* says 'gptq'"):
        read(GPTQ, "int8")
    with pytest.raises(
        ConfigError, match=r"'gptq', but config\.json has no quantization_config; plain weights"
    ):
        read_quantization({}, "config.json", wanted="gptq")
    with pytest.raises(ConfigError, match="quantization is 'int3'; it must be one of auto, int8, int4, fp8"):
        WorkerConfig(model="m", socket=Path("s"), quantization="int3")


def test_plain_weights_stay_plain_unless_the_user_says_otherwise() -> None:
    assert read_quantization({"quantization_config": None}, "config.json") is None
    made = read_quantization({}, "config.json", wanted="int4")
    assert made is not None
    assert made.scheme_of(["model.layers.0.mlp.up_proj"]) == AtLoad("int4")
    assert made.scheme_of(["lm_head"]) is None
    told = read_quantization({}, "config.json", wanted="squeezellm")
    assert told is not None
    assert told.schemes == (SqueezeLlm(4),)
