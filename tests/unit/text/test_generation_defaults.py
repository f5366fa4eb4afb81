"""The recommended sampling parameters of a model, by our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frontend.text.generation_defaults import load_generation_defaults
from pagewire.base.errors import ConfigError


def load(directory: Path, content: Any) -> dict[str, Any]:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return load_generation_defaults(directory)


def test_without_the_file_there_are_none(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path) == {}


def test_sampling_fields_are_taken_and_the_rest_is_left(tmp_path: Path) -> None:
    config = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_new_tokens": 512,
        "num_beams": 4,
    }
    assert load(tmp_path, config) == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_tokens": 512,
    }


def test_do_sample_false_does_not_make_a_model_greedy(tmp_path: Path) -> None:
    assert load(tmp_path, {"do_sample": False, "temperature": 0.6}) == {"temperature": 0.6}
    assert load(tmp_path, {"do_sample": False}) == {}


def test_null_leaves_the_servers_default(tmp_path: Path) -> None:
    assert load(tmp_path, {"temperature": None, "top_p": 0.9}) == {"top_p": 0.9}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"top_p": True}, "top_p is True"),
        ([], "JSON list; it must hold an object"),
    ],
)
def test_other_kinds_of_values_are_refused(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, config)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_generation_defaults(tmp_path)
