"""From a directory to a model: formats, and errors that name the file and the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import WorkerConfig
from engine.cpu.runner import CpuModelRunner
from engine.loader import checkpoint, tied
from engine.loader.checkpoint import open_checkpoint
from engine.loader.tied import have_same_values
from engine.worker.build import build_worker
from pagewire.base.errors import ConfigError
from tests.integration.plan_driver import PlanDriver
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model

INDEX = "model.safetensors.index.json"
PROMPT = [5, 9, 33, 7, 21, 60, 3]


def runner(directory: Path, **settings: object) -> CpuModelRunner:
    defaults = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "max_num_seqs": 4}
    config = WorkerConfig(model=str(directory), socket=Path("unused"), **{**defaults, **settings})
    return build_worker(config).runner


def tokens(directory: Path, **settings: object) -> list[int]:
    [request] = PlanDriver(runner(directory, **settings)).generate([PROMPT], 12)
    return request.output


def transformers_tokens(directory: Path) -> list[int]:
    transformers = pytest.importorskip("transformers", minversion="5")

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    output = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(PROMPT) :].tolist()


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA3_ROPE},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
    ],
    ids=str,
)
def test_every_variant_of_the_family_computes_what_transformers_does(tmp_path: Path, changes: dict) -> None:
    directory = write_model(tmp_path, **changes)
    assert tokens(directory) == transformers_tokens(directory)


def test_shards_under_an_index_are_the_same_model_as_one_file(tmp_path: Path) -> None:
    assert tokens(write_model(tmp_path / "one")) == tokens(write_model(tmp_path / "three", shards=3))


def test_dummy_weights_need_only_a_config_and_repeat_with_their_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, again, other = (
        runner(tmp_path, load_format="dummy", seed=seed).model.state_dict() for seed in (1, 1, 2)
    )
    name = "model.embed_tokens.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert tokens(tmp_path, load_format="dummy")


def test_an_lm_head_saved_beside_tied_embeddings_is_tolerated(tmp_path: Path) -> None:
    weights = tensors(CONFIG)
    copied = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    assert tokens(write_model(tmp_path / "a", copied)) == tokens(write_model(tmp_path / "b", weights))


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with an lm_head made of the embedding."""
    weights = tensors(CONFIG)
    return {**weights, "lm_head.weight": change(weights["model.embed_tokens.weight"].clone())}


def test_an_lm_head_that_equals_the_embedding_takes_no_memory(tmp_path: Path) -> None:
    model = runner(write_model(tmp_path, with_head(lambda head: head))).model
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def _reversed(head: torch.Tensor) -> torch.Tensor:
    return head.flip(0)


def _changed_at_the_end(head: torch.Tensor) -> torch.Tensor:
    head[-1] = 10 * head[0]
    return head


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change", [_reversed, _changed_at_the_end])
def test_an_lm_head_that_differs_from_the_embedding_is_used_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable, shards: int
) -> None:
    monkeypatch.setattr(tied, "CHUNK_ELEMENTS", 100)
    directory = write_model(tmp_path, with_head(change), shards=shards)
    expected = transformers_tokens(directory)
    assert tokens(directory) == expected
    assert tokens(write_model(tmp_path / "tied")) != expected


@pytest.mark.parametrize("nudge", [0.0, 1e-4, 0.1])
def test_heads_are_compared_in_the_models_dtype(tmp_path: Path, nudge: float) -> None:
    """An lm_head in float32 that is the embedding once it is rounded to bfloat16."""
    weights = tensors(CONFIG)
    embedding = weights["model.embed_tokens.weight"].bfloat16()
    head = embedding.float() * (1 + nudge)
    directory = write_model(
        tmp_path, {**weights, "model.embed_tokens.weight": embedding, "lm_head.weight": head}
    )
    stored = open_checkpoint(directory)
    pair = stored.find("lm_head.weight"), stored.find("model.embed_tokens.weight")
    assert have_same_values(*pair, torch.bfloat16) == (nudge < 0.01)
    assert have_same_values(*pair, torch.float32) == (nudge == 0)


def test_an_lm_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' has shape \[63, 32\]; 64 is needed"):
        runner(write_model(tmp_path, with_head(lambda head: head[:-1].clone())))


def test_saved_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    weights = tensors(CONFIG)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert tokens(write_model(tmp_path, weights))


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("model.layers.1.self_attn.k_proj.weight", None, "lacks 1 tensors of the model: model.layers.1."),
        ("model.layers.0.extra.weight", torch.zeros(1), "'model.layers.0.extra.weight' is not part of"),
        ("model.norm.weight", torch.zeros(33), "'model.norm.weight' has shape [33]; [32] is needed"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(47, 32), "has shape [47, 32]; 48 is needed"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 31), "has shape [48, 31]; [48, 32] is needed"),
        ("model.embed_tokens.weight", torch.zeros(65, 32), "has shape [65, 32]; 64 is needed in dimension 0"),
    ],
    ids=["missing", "unexpected", "norm", "rows", "columns", "vocabulary"],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, name: str, replacement: torch.Tensor | None, message: str
) -> None:
    weights = tensors(CONFIG)
    if replacement is None:
        del weights[name]
    else:
        weights[name] = replacement
    with pytest.raises(ConfigError) as error:
        runner(write_model(tmp_path, weights))
    assert message in error.value.message
    assert str(tmp_path) in error.value.message


def add_stale_copy(directory: Path, name: str, *, before: bool) -> None:
    """Puts zeros under a tensor's name into a file before or after the one that the index gives it to."""
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    other = directory / files[files.index(index[name]) + (-1 if before else 1)]
    content = load_file(other)
    shape = load_file(directory / index[name])[name].shape
    save_file({**content, name: torch.zeros(shape)}, other)


@pytest.mark.parametrize("before", [False, True])
def test_a_stale_copy_in_a_file_that_the_index_does_not_name_is_ignored(tmp_path: Path, before: bool) -> None:
    whole = write_model(tmp_path / "whole", shards=3)
    stale = write_model(tmp_path / "stale", shards=3)
    index = json.loads((stale / INDEX).read_text())["weight_map"]
    name = next(name for name, file in index.items() if "00002" in file and "mlp" in name)
    add_stale_copy(stale, name, before=before)
    assert tokens(stale) == tokens(whole)
    if before:  # transformers takes the copy of the last file
        assert tokens(stale) == transformers_tokens(stale)


def test_a_tensor_in_two_files_that_the_index_gives_to_neither_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    add_stale_copy(tmp_path, "model.norm.weight", before=True)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"is in .*00001-of-00002.* already"):
        runner(tmp_path)


def test_a_tensor_in_another_file_than_the_index_says_is_found(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    expected = tokens(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    weight_map = index["weight_map"]
    weight_map["model.norm.weight"] = next(
        file for file in weight_map.values() if file != weight_map["model.norm.weight"]
    )
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert tokens(tmp_path) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"not a tensor file", "cannot be read as safetensors"),
        ("model.safetensors.index.json", b"{", r"index\.json is not valid JSON"),
        ("model.safetensors.index.json", b"{}", "is not a checkpoint index"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', "its own directory"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    write_model(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        runner(tmp_path)


def test_all_files_together_may_not_have_too_many_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 15)
    with pytest.raises(ConfigError, match="has more than 15 tensors"):
        runner(write_model(tmp_path, shards=2))


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        runner(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cpu:1"}, "device is 'cpu:1'"),
        ({"load_format": "pickle"}, "load_format is 'pickle'; it must be one of auto, safetensors"),
        ({"load_format": "gguf"}, "needs a .gguf file"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_model_len": 257}, "max_model_len is 257; this model was made for at most 256"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": None, "kv_cache_memory": 1000}, "takes 4096 bytes and 1000 bytes are available"),
    ],
    ids=str,
)
def test_a_wrong_setting_says_what_is_allowed(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        runner(write_model(tmp_path), **settings)
    assert message in error.value.message


def test_max_model_len_is_cut_to_what_the_pool_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = WorkerConfig(model=str(write_model(tmp_path)), socket=Path("unused"), num_blocks=3, device="cpu")
    facts = build_worker(config).facts
    assert (facts.limits.max_model_len, facts.limits.num_blocks) == (48, 3)
    assert "cut from 256 to 48" in caplog.text


def test_the_pool_is_no_larger_than_its_rows_can_use(tmp_path: Path) -> None:
    config = WorkerConfig(
        model=str(write_model(tmp_path)), socket=Path("unused"), max_num_seqs=2, device="cpu"
    )
    assert build_worker(config).facts.limits.num_blocks == 2 * 256 // 16
