"""GET /tokenizer_info, with /tokenize and /detokenize, is what lm-eval's remote tokenizer needs."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest

from frontend.text.tokenizer_config import TokenizerFacts
from pagewire.base.errors import ConfigError
from tests.unit.frontend.conftest import CHATML, FrontendFactory, RunningFrontend


async def test_it_tells_special_tokens_and_the_template(frontend: RunningFrontend) -> None:
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/tokenizer_info") as response:
            info = await response.json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|im_end|>", None, None)
    assert info["chat_template"] == CHATML
    assert (info["vocab_size"], info["model_max_length"]) == (257, 200)


async def test_the_template_is_the_one_in_use(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(chat_template="{{ messages[0].content }}")
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/tokenizer_info") as response:
            assert (await response.json())["chat_template"] == "{{ messages[0].content }}"


async def test_it_needs_a_key_where_there_are_some(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(api_keys=("sesame",))
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/tokenizer_info") as response:
            assert response.status == 401


async def test_what_lm_eval_sends_is_answered_as_it_reads_it(frontend: RunningFrontend) -> None:
    """RemoteTokenizer of lm_eval/utils.py: its eos_token_id, encode and decode."""
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/tokenizer_info") as response:
            eos = (await response.json())["eos_token"]
        for text, ids in ((eos, [256]), ("hi", [104, 105])):
            asked = {"prompt": text, "add_special_tokens": False}
            async with session.post("/tokenize", json=asked) as response:
                assert (await response.json())["tokens"] == ids
            async with session.post("/detokenize", json={"tokens": ids}) as response:
                assert (await response.json())["prompt"] == text


def test_facts_are_read_from_tokenizer_config(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "additional_special_tokens": ["<a>", {"content": "<b>"}, 3],
        "add_bos_token": True,
        "add_eos_token": "yes",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    facts = TokenizerFacts.load(tmp_path)
    assert facts.tokenizer_class == "LlamaTokenizer"
    assert facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert facts.additional_special_tokens == ("<a>", "<b>")
    assert (facts.add_bos_token, facts.add_eos_token) == (True, None)


def test_a_model_without_the_file_has_the_defaults(tmp_path: Path) -> None:
    assert TokenizerFacts.load(tmp_path) == TokenizerFacts()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError):
        TokenizerFacts.load(tmp_path)
