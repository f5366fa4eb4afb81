"""Tokens that end a turn are found in converted tokenizers, and where only a family's code has them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.readers.eos import tokenizer_eos_token_id, turn_end_token_ids
from tests.unit.hub.sentencepiece_models import train

SIZE = 420


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path_factory.mktemp("home")))


def write(directory: Path, config: dict[str, Any], **files: Any) -> None:
    for name, content in {"config": config, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("eos", "added", "expected"),
    [
        ("</s>", {}, 2),
        ({"content": "<|im_end|>"}, {"<|im_end|>": SIZE + 3}, SIZE + 3),
        ("<|im_end|>", {}, SIZE),  # which nothing gives an id, so that it gets the next one
    ],
)
def test_the_eos_token_of_a_sentencepiece_model_is_found(
    tmp_path: Path, eos: Any, added: dict[str, int], expected: int
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    write(tmp_path, {"model_type": "llama"}, tokenizer_config={"eos_token": eos}, added_tokens=added)
    assert tokenizer_eos_token_id(tmp_path) == expected
    assert turn_end_token_ids(tmp_path, "llama") == ()


def test_chatglm_turns_end_where_another_role_begins(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    write(tmp_path, {"model_type": "chatglm"})
    assert turn_end_token_ids(tmp_path, "chatglm") == (SIZE + 6, SIZE + 8)


def test_qwen_turns_end_with_its_control_tokens(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    write(tmp_path, {"model_type": "qwen"}, tokenizer_config={"tokenizer_class": "QWenTokenizer"})
    assert turn_end_token_ids(tmp_path, "qwen") == (256, 258, 257)


def test_a_model_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "chatglm"}, tokenizer_config={"eos_token": "</s>"})
    assert turn_end_token_ids(tmp_path, "chatglm") == ()
    assert tokenizer_eos_token_id(tmp_path) is None
