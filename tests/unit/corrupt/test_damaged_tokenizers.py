"""SentencePiece models and tiktoken files that are damaged are read as they are or refused by name."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from tests.unit.corrupt.mutations import damage_bytes, damage_json
from tests.unit.corrupt.test_damage import is_refused_by_name
from tests.unit.hub.sentencepiece_models import train

seeds = st.integers(0, 2**64).map(Random)
SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "add_bos_token": True,
    "legacy": False,
    "additional_special_tokens": ["<x>"],
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "421": {"content": "<y>"}},
}
TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path_factory.mktemp("home")))


def is_refused(directory: Path) -> bool:
    def use() -> None:
        tokenizer = TextTokenizer.load(directory)
        ids = tokenizer.encode("The quick brown fox isn't 12 years old: été, 北京!\n")
        tokenizer.decode(ids, skip_special_tokens=True)

    return is_refused_by_name(directory, use)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=seeds)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models(tmp_path: Path, kind: str, random: Random) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        damage_bytes(train(kind, normalization_rule_name="nfkc"), random)
    )
    is_refused(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=seeds)
def test_tiktoken_files(tmp_path: Path, random: Random) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(damage_bytes(TIKTOKEN, random))
    is_refused(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=seeds)
def test_settings_beside_them(tmp_path: Path, random: Random) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    damaged = damage_json(SETTINGS, random)
    (tmp_path / "tokenizer_config.json").write_bytes(damaged)
    is_refused(tmp_path)


def test_a_token_that_is_far_too_long_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(TIKTOKEN + base64.b64encode(b"a" * 10**6) + b" 256\n")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="line 257"):
        TextTokenizer.load(tmp_path)
    assert time.monotonic() - began < 5
